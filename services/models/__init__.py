"""Causal language models in PyTorch: loading, fingerprints and the packed forward pass."""
