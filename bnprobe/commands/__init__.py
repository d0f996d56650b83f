"""What each command does, one file each, from top to bottom."""
