"""The demo: MiniLM learns to tell good movie reviews from bad ones. Run `python -m demo "a sentence"`."""
