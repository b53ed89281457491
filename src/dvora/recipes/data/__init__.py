"""Reading, checking and splitting users' data."""
