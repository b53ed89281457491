"""Many adapters over one base: a batch in which every row has another one, and what thousands of them cost.

Run from the repository's root: python -m benchmarks.many_adapters
"""
