"""``python -m dispatch_compile trace``: a whole program inside a tracing mode."""
