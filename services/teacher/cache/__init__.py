"""Scores kept by what they are scores of: a content-addressed cache in front of any engine."""
