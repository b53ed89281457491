"""The functions of `functional` that training spends its time in, with gradients in closed form."""
