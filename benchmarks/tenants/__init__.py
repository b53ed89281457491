"""A classifier for each of many tenants, methods side by side: `python -m benchmarks.tenants`."""
