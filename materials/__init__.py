"""Models and data for the demo, the examples, the documentation and the benchmarks: pinned, checked, fetched once."""
