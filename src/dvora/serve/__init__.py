"""Serving over HTTP: one base model in memory, and for every request its own adapter."""
