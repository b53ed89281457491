"""PEFT's own method comparison with DVoRA: its scripts unchanged, our experiment folders, rows in its form."""
