"""Real models, quantised by transformers while they load: adapt, train, save, load."""
