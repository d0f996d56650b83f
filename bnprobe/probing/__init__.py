"""Run the user's model on the user's batches, on both paths, and gather the evidence."""
