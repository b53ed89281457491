"""The functions that training spends its time in, with gradients in closed form, and the same for CUDA devices."""
