"""Room of what knows torch only: dtypes, tracing, buffers."""
