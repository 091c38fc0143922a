"""Durable streams of jobs on Valkey or Redis."""
