"""The vLLM engine: a causal LM served as a pooling model whose answers are scores."""
