"""Code that the callbacks of all frameworks share."""
