"""Engines: what computes scores."""
