"""Many adapters over one base model: held in slots, gathered by row, served and trained together."""

from .bank import AdapterBank, BankStats
from .hooks import Batch
from .training import TrainableAdapters, TrainedRows

__all__ = ["AdapterBank", "BankStats", "Batch", "TrainableAdapters", "TrainedRows"]
