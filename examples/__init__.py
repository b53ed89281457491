"""DVoRA with every trainer: one file a trainer, each a program that trains, checks what it claims and reports it.

Run one from the repository's root: python -m examples.transformers_trainer. All of them: make examples; those with Ray
and Flower: make cluster.

To copy one, put your model and data where it calls `materials` (a folder for `from_pretrained`; texts and labels), and
leave out what it takes from `examples.checks`, which only proves what it claims.
"""
