"""Where task vectors come from: one module for each kind of expert."""
