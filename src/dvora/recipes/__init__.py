"""Recipes: from data and a model to a trained, evaluated and merged one; what the command line calls."""
