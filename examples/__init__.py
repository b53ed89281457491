"""DVoRA with every trainer: one file a trainer, each a program that trains, checks what it claims and reports it.

All of them, or those named: python -m examples [NAME ...]
"""
