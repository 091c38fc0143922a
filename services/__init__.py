"""What other training systems use: the scoring API, the teacher replica, the queue."""
