"""Runs in folders of their own: checked before a model is loaded, trained, sampled, reported on."""
