"""Ray Train: a TorchTrainer with two workers; the checkpoints that Ray keeps hold the adapter only."""

import os

# Before Ray is imported: it reports how it is used to its makers, and warns of what it will change one day.
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TRAIN_V2_ENABLED": "1"}
