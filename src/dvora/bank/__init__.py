"""Many adapters over one base model: held in slots, gathered by row, served and trained together."""

from ..rows.batch import Batch
from .bank import AdapterBank, BankStats, UnknownAdapterError, Version
from .training import TrainableAdapters, TrainedRows

__all__ = [
    "AdapterBank",
    "BankStats",
    "Batch",
    "TrainableAdapters",
    "TrainedRows",
    "UnknownAdapterError",
    "Version",
]
