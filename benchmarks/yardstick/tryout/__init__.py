"""A trial on a CPU: PEFT's scripts unchanged, with tiny models and data of the same form in place of the real ones."""
