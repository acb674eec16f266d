"""What a try costs: load, calibrate, factor, evaluate, export."""
