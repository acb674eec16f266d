"""The job store: the one package that the service and its workers share (settings, tables, queue, artifacts)."""
