"""What is done with LoRA and model files without training."""
