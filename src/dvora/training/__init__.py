"""For training loops: parameter groups and learning rates, and checks that all processes agree."""

from .agreement import AdapterSettings, check_ranks_agree
from .optimizer_groups import parameter_groups, recommended_rates

__all__ = ["AdapterSettings", "check_ranks_agree", "parameter_groups", "recommended_rates"]
