"""The frozen copy of a model made ready for training: shared, quantised, offloaded, sharded, prepacked."""
