"""What the user asked for: the spec, and where its values come from."""
