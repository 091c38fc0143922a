"""Objectives as a composition of independent settings, compiled to signal requests."""
