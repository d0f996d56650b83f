"""Pure functions from tensors to tensors: moments, mismatch, theory, histograms, intervals."""
