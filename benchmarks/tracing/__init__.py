"""Traces looked at: a small collector, trees in plain text, and what tracing costs."""
