"""Adapters by row of a batch: which batch a call is in, and the factors and heads of its rows."""

# First, as in `adapter_file`, which this room asks.
import peft as peft
