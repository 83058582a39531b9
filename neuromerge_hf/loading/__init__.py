"""Loading merged models."""
