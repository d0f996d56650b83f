"""Other people's expectations: what PyTorch's tests and other packages ask of a norm layer, asked of ``bnprobe.nn``."""
