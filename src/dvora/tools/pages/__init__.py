"""Self-contained HTML pages: one file, no server, no script, nothing loaded from elsewhere."""
