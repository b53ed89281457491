"""PEFT's own generic tests, run on DVoRA."""
