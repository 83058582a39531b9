"""Choosing hyper-parameters and methods on validation data."""
