"""Many adapters over one base: a batch in which every row has another one, requests for thousands, what each costs.

Run from the repository's root: python -m benchmarks.many_adapters
"""
