"""Kernels for CUDA devices, each one pass over memory: the combination, its backward pass, the structured transform."""
