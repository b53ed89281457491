"""What an adapter is outside a model: its settings, where its values stand, and its files."""

# First, since it makes PEFT know the method, for which all of this room is asked.
import peft as peft
