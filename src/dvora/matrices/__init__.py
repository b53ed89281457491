"""Room of the frozen matrices: what knows a seed, a rank and sizes, and never the weight."""
