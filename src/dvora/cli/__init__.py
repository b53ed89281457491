"""The command line: every file is one command, which calls a recipe and shows what it returns."""
