"""Join the verdicts of rules into diagnoses."""
