"""Autograd functions of the adapters: products with few or structured factors, and their gradients."""
