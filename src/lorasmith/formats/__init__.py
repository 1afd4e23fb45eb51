"""LoRA files of every program: detected, read and written."""
