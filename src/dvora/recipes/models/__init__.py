"""Loading of bases and of adapters upon them."""
