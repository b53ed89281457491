"""An adapter for each of many small users, methods side by side: `python -m benchmarks.users`."""
