"""Is the diagnosis right? Known faults planted in healthy networks. ``python -m benchmarks.faults --help``."""
