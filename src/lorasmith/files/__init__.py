"""What can be done with LoRA files and models without training: merged, resized, extracted, described."""
