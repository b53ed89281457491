"""The functions that training spends its time in, with gradients in closed form."""
