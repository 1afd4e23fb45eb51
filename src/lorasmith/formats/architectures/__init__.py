"""What is known of each architecture without loading a model: one file an architecture, and their registry."""
