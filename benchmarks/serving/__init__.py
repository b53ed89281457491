"""`dvora serve` under load, beside the base, a merged model and vLLM."""
