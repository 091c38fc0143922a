"""Built-in tasks with exact checkers."""
