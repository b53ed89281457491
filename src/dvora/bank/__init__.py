"""Many adapters over one base model: held in slots, gathered by row, served and trained together."""

from .bank import AdapterBank
from .stats import BankStats
from .tenant_adamw import TenantAdamW
from .trainable import TrainableAdapters, TrainedRows

__all__ = ["AdapterBank", "BankStats", "TenantAdamW", "TrainableAdapters", "TrainedRows"]
