"""Quality of DVoRA beside its peers on real models and data: `python -m benchmarks.quality`."""
