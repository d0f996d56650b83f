"""Public helpers for authors of rules."""
