"""Triton kernels of the memory-bound parts of the layer. Only the modules inside import triton, and only on CUDA."""
