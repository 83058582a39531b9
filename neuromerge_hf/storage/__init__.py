"""Finding models on disk and on the Hub, and reading the tensors of their weight files."""
