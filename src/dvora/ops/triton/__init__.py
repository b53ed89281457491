"""What CUDA devices run in one pass over memory: the combination, its backward pass, the structured transform."""
