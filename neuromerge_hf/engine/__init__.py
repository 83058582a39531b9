"""Passes over the inputs, block by block: thresholds, merging, statistics, and writing."""
