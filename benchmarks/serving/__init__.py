"""`dvora serve` under load, beside the base, a merged model and LoRA through the same server."""
