"""Run the model with hooks on its norm layers, and collect statistics."""
