"""The sources of task vectors: one module for each kind of expert."""
