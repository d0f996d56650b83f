"""Benchmarks of bnprobe, interleaved with what it is compared to. See ``python -m benchmarks --help``."""
