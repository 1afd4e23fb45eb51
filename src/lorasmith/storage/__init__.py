"""Bytes on disk: safetensors files, atomic writes, hashes, a lock on a folder."""
