"""Geometry tokens -> K context tokens per DiT block; one file per compressor."""
