"""For training loops: parameter groups, learning rates and a search for one, and checks that all processes agree."""

from .agreement import AdapterSettings, check_ranks_agree
from .optimizer_groups import parameter_groups, recommended_rates
from .rate_search import RatePlan, RateSearch, RateTrial, find_rate, rate_plan

__all__ = [
    "AdapterSettings",
    "RatePlan",
    "RateSearch",
    "RateTrial",
    "check_ranks_agree",
    "find_rate",
    "parameter_groups",
    "rate_plan",
    "recommended_rates",
]
