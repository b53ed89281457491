"""Adapters by row of a batch: whose batch a call is in, and the factors and heads of its rows."""
