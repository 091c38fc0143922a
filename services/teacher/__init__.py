"""The teacher replica process and its engines."""
