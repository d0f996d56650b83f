"""Watch the norm layers of a model while it trains."""
