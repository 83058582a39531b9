"""`NeuroMergeCallback` merges when training ends. Each training framework has its own module."""
