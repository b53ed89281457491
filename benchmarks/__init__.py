"""Real models and data for the demo, the tests and the benchmarks: fetched on demand, verified, kept outside git."""
