"""The templates of the model cards that a merge writes."""
