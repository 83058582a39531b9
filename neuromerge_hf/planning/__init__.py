"""What a merge will do, found and checked from metadata alone."""
