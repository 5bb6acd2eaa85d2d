"""Text to reward parts: names to functions, a process of them, several with deadlines."""
