"""Scoring: our vLLM teacher beside stock vLLM, the transformers engine and a bare torch loop."""
