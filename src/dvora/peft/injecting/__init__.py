"""Putting adapters into a model: which layers, and the checks before anything is changed."""
