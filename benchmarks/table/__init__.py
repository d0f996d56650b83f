"""Batch effects in tables: bnprobe beside the libraries that have ComBat."""
