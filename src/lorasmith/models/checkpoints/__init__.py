"""Original checkpoints read as what diffusers and transformers load."""
