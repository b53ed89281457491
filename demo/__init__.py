"""The demo: MiniLM learns to classify movie reviews as good or bad. Run `python -m demo "a sentence"`."""
