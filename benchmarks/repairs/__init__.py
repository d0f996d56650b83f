"""What do repairs give beside plain BN, fine-tuned in the same way? ``python -m benchmarks.repairs --help``."""
