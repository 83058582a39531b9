"""Where models lie and how their tensors are read: folders and repositories, files and their headers."""
