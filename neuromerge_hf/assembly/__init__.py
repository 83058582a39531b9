"""From a plan to a complete folder."""
