"""Models with different tokens: whose tokenizer is taken, and how the rows of embeddings are aligned."""
