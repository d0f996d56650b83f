"""From numbers to findings: thresholds, causes, ranking. Nothing here runs the model."""
