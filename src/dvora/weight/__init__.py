"""Room of one adapted weight: its state between passes, merging, the plain layer."""
