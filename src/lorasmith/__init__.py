"""lorasmith trains low-rank adapters (LoRA and its relatives) for diffusion models."""

__version__ = "0.1.0"
