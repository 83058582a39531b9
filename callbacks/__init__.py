"""`NeuroMergeCallback`, one module per training framework: merge when training ends."""
