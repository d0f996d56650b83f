"""Every cause that bnprobe can name, one file each."""
