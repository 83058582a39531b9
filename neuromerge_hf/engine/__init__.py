"""Passes over the inputs, block by block: they find thresholds, merge, collect statistics and write."""
