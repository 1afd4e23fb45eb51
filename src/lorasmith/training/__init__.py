"""The training loop, and what it needs to be started, saved and resumed."""
