"""Modules of learned methods, outside the tree of the model that they serve: safetensors in, safetensors out."""
