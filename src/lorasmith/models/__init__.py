"""Models to train on: families, where their weights come from, and original checkpoints."""
