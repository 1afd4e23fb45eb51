"""The diffusion process, losses, sampling and the validation loss."""
