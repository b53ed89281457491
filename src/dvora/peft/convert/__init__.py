"""Conversion to and from other methods."""
