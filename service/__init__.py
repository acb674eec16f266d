"""Who asked, and where it stands: REST, jobs, queue, events, artifacts, CLI. Holds no torch."""
