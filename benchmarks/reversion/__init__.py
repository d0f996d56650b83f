"""What it is worth that a monitor changes layers by itself."""
