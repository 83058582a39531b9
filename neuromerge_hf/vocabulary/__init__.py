"""Models with different vocabularies: the choice of a tokenizer, and the alignment of embedding rows."""
