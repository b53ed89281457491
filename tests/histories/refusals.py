"""Which operation may be refused, when, and with which words; a refusal changes nothing, and any other is a fault."""

from collections.abc import Callable
from typing import NamedTuple

from tests.histories.operations import Case


class Refusal(NamedTuple):
    """An error, and an expression that its message matches."""

    error: type[Exception]
    says: str
    when: Callable[[Case], bool] = lambda case: True


def _evaluates(case: Case) -> bool:
    return not case.shadow.training


def _trains_nothing(case: Case) -> bool:
    return case.trains_nothing


def _is_merged(case: Case) -> bool:
    return case.shadow.is_merged


MERGED = Refusal(ValueError, "merged")
NOT_TRAINED = Refusal(RuntimeError, "adapters are merged .* would give them no gradients", _trains_nothing)
REFUSALS: dict[str, tuple[Refusal, ...]] = {
    "explicit_backward": (Refusal(RuntimeError, "backward needs a forward before it", _evaluates),),
    "load_base_while_merged": (MERGED, Refusal(RuntimeError, "merged")),
    "load_adapter_of_the_same_name": (MERGED._replace(when=_is_merged),),
    "load_vectors_while_merged": (MERGED,),
    "hotswap": (MERGED._replace(when=_is_merged),),
    "interrupt_a_pass": (NOT_TRAINED,),
    "run_in_autocast": (NOT_TRAINED,),
    "run_under_vmap": (NOT_TRAINED,),
    "run_with_another_default_device": (NOT_TRAINED,),
    "run_with_another_default_dtype": (NOT_TRAINED,),
    "siblings_in_other_circumstances": (NOT_TRAINED,),
    "train_while_merged_for_a_while": (MERGED, Refusal(RuntimeError, "merged"), Refusal(UserWarning, "merged")),
}
