"""Native kernels for CPUs: C sources, their build and their dispatch."""
