"""Where the parts of a model come from: a folder, a single file, the hub."""
