"""How many rows, adapters and slots: what the plan and the page have in common."""

ROWS = 64
"""Of a batch."""
MANY = 1024
"""Adapters known to a bank, where nothing else is said."""
KNOWN = (ROWS, MANY, 10_000)
SLOTS = 256
