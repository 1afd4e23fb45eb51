"""Low-rank adapters, one algorithm a file, and how they hang on a net."""
