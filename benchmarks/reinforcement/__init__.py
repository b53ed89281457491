"""GRPO on SmolLM2 with rewards that a program checks, DVoRA beside others: `python -m benchmarks.reinforcement`."""
