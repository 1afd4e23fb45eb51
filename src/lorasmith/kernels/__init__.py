"""Fused operations of the training core."""
