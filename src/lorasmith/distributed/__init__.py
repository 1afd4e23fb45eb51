"""Processes that train one LoRA together: how they meet, and what they exchange."""
