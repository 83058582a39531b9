"""Merged models in memory."""
