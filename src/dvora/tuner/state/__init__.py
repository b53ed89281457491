"""Saving and loading of an adapter's values."""
