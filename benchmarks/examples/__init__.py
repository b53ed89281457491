"""Run the examples, each with a time limit and without leaving processes behind, and write their table."""
