"""How fast, and how much memory: adapted models against their frozen base and against their peers, in one run.

Run from the repository's root: python -m benchmarks.speed
"""
