"""Plans of merges: what a merge will do, found and checked from metadata alone."""
