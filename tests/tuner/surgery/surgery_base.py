"""What the rules of the surgery histories have in common: the model, its reference, and the checks after every step."""

import copy
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from dvora import MergePrecisionWarning
from tests.tuner.models_compared import assert_unchanged, snapshot
from tests.tuner.surgery.surgery_checks import (
    check_close,
    check_deltas,
    check_outputs,
    check_state,
    check_values,
    vectors_of,
)
from tests.tuner.surgery.surgery_model import PARAMETERS, TARGETS, TOKENS
from tests.tuner.surgery.surgery_reference import Reference
from tests.tuner.surgery.surgery_settings import VECTORS, Adapter, Place, Settings, vector_dtype
from tests.tuner.tiny import same_bits

NAMES = ("first", "second", "third", "fourth")
DTYPES = [torch.float32, torch.bfloat16, torch.float64]

_modules = [target for target in TARGETS if target not in PARAMETERS]
some_settings = st.builds(
    Settings,
    targets=st.lists(st.sampled_from(TARGETS), min_size=1, unique=True).map(lambda names: tuple(sorted(names))),
    r=st.sampled_from([3, 1, 7]),
    alpha=st.sampled_from([None, 2.0]),
    direction=st.sampled_from(["unit", "weight"]),
    detach_norm=st.booleans(),
    seed=st.sampled_from([0, 1]),
    projections=st.sampled_from(["structured", "kaiming_uniform"]),
    random_start=st.booleans(),
    train=st.sampled_from([VECTORS, VECTORS, ("magnitude",), ("lambda_b", "lambda_d")]),
    magnitude_only=st.just(()) | st.sampled_from(_modules).map(lambda name: (name,)),
    strength=st.sampled_from([1.0, 1.0, 0.5, 0.25]),
)


def drawn(choices: Callable[["SurgeryBase"], Sequence[object]]) -> st.SearchStrategy:
    """One of the choices that the machine has at this step."""
    return st.runner().flatmap(lambda machine: st.sampled_from(choices(machine)))


def step(**strategies: st.SearchStrategy) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A rule that does not follow itself at once: Hypothesis likes to copy steps, and most change nothing then."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @wraps(function)
        def made(machine: "SurgeryBase", **values: object) -> None:
            machine.previous = function.__name__
            function(machine, **values)

        return precondition(lambda machine: machine.previous != function.__name__)(rule(**strategies)(made))

    return decorate


present = drawn(lambda machine: sorted(machine.reference.adapters))
several = st.runner().flatmap(
    lambda m: st.lists(st.sampled_from(sorted(m.reference.adapters)), min_size=1, unique=True)
)
some_saved = drawn(lambda machine: machine.saved)

has_adapters = precondition(lambda machine: bool(machine.reference.adapters))
has_saved = precondition(lambda machine: bool(machine.saved))
has_room = precondition(lambda machine: len(machine.reference.adapters) < len(NAMES))
# PEFT's wrapper remembers one active adapter by name, also when that one was deleted and several or none are active.
wrapper_is_usable = precondition(lambda machine: machine.model.active_adapter in machine.reference.adapters)


class Saved:
    """A folder, and the adapter that was saved in it."""

    def __init__(self, folder: Path, adapter: Adapter) -> None:
        self.folder, self.adapter = folder, adapter

    def __repr__(self) -> str:
        return f"<{self.folder.parent.name}/{self.folder.name}>"


class SurgeryBase(RuleBasedStateMachine):
    """`self.model` must always be what `self.reference` says."""

    steps_of_histories: ClassVar[list[int]] = []
    steps_by_rule: ClassVar[Counter[str]] = Counter()

    model: PeftModel
    reference: Reference
    compiled_passes_left: int
    """Compiling takes seconds, so that only some histories do it, and not for long."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0
        self.previous = ""
        self.saved: list[Saved] = []
        self.known: dict[Place, nn.Parameter] = {}
        self.folder = tempfile.TemporaryDirectory()
        self.compiled: Callable[[Tensor], Tensor] | None = None

    def teardown(self) -> None:
        self.folder.cleanup()
        self.steps_of_histories.append(self.steps)

    @invariant()
    def model_is_what_the_reference_says(self) -> None:
        if not self.steps:
            return
        self.reference.slack = self.reference.conditioning()
        for _ in range(2):  # no check may change anything
            check_state(self.model, self.reference)
            check_values(self.model, self.reference)
            check_outputs(self.model, self.reference)
        check_deltas(self.model, self.reference)
        self._check_optimizers_keep_working()
        self._check_compiled()

    def count(self, step: str) -> None:
        """To be called by every rule."""
        self.steps += 1
        self.steps_by_rule[step] += 1

    def free_name(self) -> str:
        return next(name for name in NAMES if name not in self.reference.adapters)

    def adopt(self, model: PeftModel) -> None:
        """Go on with another model."""
        self.model = model
        self.known.clear()
        self.compiled = None

    def take_over_new(self, name: str, settings: Settings, trained: bool) -> None:
        """Enter a new adapter, which starts as it has to, in the reference; move its vectors if `trained`."""
        self.reference.add(name, settings)
        generator = torch.Generator().manual_seed(NAMES.index(name))
        for place, vector in vectors_of(self.model).items():
            if place.adapter == name:
                held = self.reference.adapters[name].vectors[place.weight]
                start = held[place.vector]
                assert vector.dtype == start.dtype
                if not settings.random_start:
                    torch.testing.assert_close(vector.detach(), start, rtol=1e-6, atol=0)
                if trained:
                    with torch.no_grad():
                        vector.add_(0.3 * torch.randn(vector.shape, generator=generator))
                held[place.vector] = vector.detach().clone()

    def save_one(self, name: str) -> None:
        """Save an adapter; the file has its vectors to the last bit, and nothing else."""
        folder = f"{self.folder.name}/{len(self.saved)}"
        self.model.save_pretrained(folder, selected_adapters=[name])
        saved = Saved(Path(folder) / name, copy.deepcopy(self.reference.adapters[name]))
        written = load_file(saved.folder / "adapter_model.safetensors")
        expected = {
            f"base_model.model.{weight.removesuffix('.weight')}.dvora_{vector}": value
            for weight, vectors in saved.adapter.vectors.items()
            for vector, value in vectors.items()
        }
        assert written.keys() == expected.keys()
        assert all(same_bits(written[key], value) for key, value in expected.items())
        self.saved.append(saved)

    def enter_loaded(self, name: str, saved: Saved) -> None:
        """The vectors of a file, in the dtype that they have to have here."""
        dtype = vector_dtype(self.reference.dtype)
        for weight, vectors in saved.adapter.vectors.items():
            self.reference.adapters[name].vectors[weight] = {k: v.to(dtype) for k, v in vectors.items()}

    def unmerges(self) -> AbstractContextManager[object]:
        """The block takes merged adapters out, and says so."""
        merged = bool(self.reference.merged)
        return pytest.warns(UserWarning, match="Unmerging the model first") if merged else nullcontext()

    @contextmanager
    def merging(self) -> Iterator[None]:
        """The block may say that adapters are merged already, and what rounding took."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MergePrecisionWarning)
            for message in ("Already following adapters were merged", "All adapters are already merged"):
                warnings.filterwarnings("ignore", message)
            yield

    @contextmanager
    def refused(self, what: str, match: str) -> Iterator[None]:
        """The block raises a ValueError, and nothing about the model has changed."""
        self.count(f"refused: {what}")
        before = snapshot(self.model)
        with pytest.raises(ValueError, match=match):
            yield
        assert_unchanged(self.model, before)

    def _check_optimizers_keep_working(self) -> None:
        """The parameters of adapters stay the same objects, which is all that an optimizer knows of them."""
        now = vectors_of(self.model)
        assert not [place for place, parameter in self.known.items() if place in now and now[place] is not parameter]
        self.known = now

    def _check_compiled(self) -> None:
        """Compiled code has to notice what the next steps change, too."""
        if self.compiled is None or not self.compiled_passes_left:
            return
        self.compiled_passes_left -= 1
        with torch.no_grad():
            check_close(self.compiled(TOKENS), self.reference.outputs(), self.reference)
