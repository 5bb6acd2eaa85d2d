"""Text to reward parts, in worker processes with deadlines."""
