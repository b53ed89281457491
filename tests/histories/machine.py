"""A state machine over PEFT models: adapted, trained, merged, cast, copied, saved, written to in any order.

After every step the model is compared with its reference: values to the last bit, outputs and updates with dense
float64.
"""

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from dvora import MergePrecisionWarning
from tests.cases import COPIES
from tests.histories.checks import (
    base_of,
    check_close,
    check_deltas,
    check_gradients,
    check_outputs,
    check_state,
    check_values,
    forward,
    take_over_merged,
    vectors_of,
)
from tests.histories.model import TARGETS, TOKENS, WEIGHTS, mixed
from tests.histories.reference import VECTORS, Adapter, Place, Reference, Settings, vector_dtype
from tests.peft.models_compared import assert_unchanged, snapshot
from tests.peft.tiny import same_bits

NAMES = ("first", "second", "third", "fourth")
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
WAYS: dict[str, Callable[[nn.Parameter, Tensor], object]] = {
    "in place": torch.no_grad()(lambda parameter, value: parameter.copy_(value)),
    "data assigned": lambda parameter, value: setattr(parameter, "data", value),
    "data in place": lambda parameter, value: parameter.data.copy_(value),
    "in inference mode": torch.inference_mode()(lambda parameter, value: parameter.mul_(1.1)),
}
COUNTED = ["in place", "data assigned"]
BASE = "__base__"
"""PEFT's name for "no adapter" in a batch."""
MIXED = "called row by row|while adapters are merged"
ROWS = len(TOKENS)
LEARNING_RATE = 0.05

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
    strength=st.sampled_from([1.0, 1.0, 0.5, 0.25]),
)


def drawn(choices: Callable[["Histories"], Sequence[object]]) -> st.SearchStrategy:
    """One of the choices that the machine has at this step."""
    return st.runner().flatmap(lambda machine: st.sampled_from(choices(machine)))


def step(**strategies: st.SearchStrategy) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A rule that does not follow itself at once: Hypothesis likes to copy steps, and most change nothing then."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @wraps(function)
        def made(machine: "Histories", **values: object) -> None:
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


class Histories(RuleBasedStateMachine):
    """`self.model` must always be what `self.reference` says."""

    model: PeftModel
    reference: Reference

    def __init__(self) -> None:
        super().__init__()
        self.previous = ""
        self.saved: list[Saved] = []
        self.known: dict[Place, nn.Parameter] = {}
        self.folder = tempfile.TemporaryDirectory()

    def teardown(self) -> None:
        self.folder.cleanup()

    @invariant()
    def model_is_what_the_reference_says(self) -> None:
        if not hasattr(self, "model"):
            return
        self.reference.slack = self.reference.conditioning(self.model)
        for _ in range(2):  # no check may change anything
            check_state(self.model, self.reference)
            check_values(self.model, self.reference)
            check_outputs(self.model, self.reference)
        check_deltas(self.model, self.reference)
        self._check_optimizers_keep_working()

    def free_name(self) -> str:
        return next(name for name in NAMES if name not in self.reference.adapters)

    def adopt(self, model: PeftModel) -> None:
        """Go on with another model."""
        self.model = model
        self.known.clear()

    def take_over_new(self, name: str, settings: Settings, trained: bool) -> None:
        """Enter a new adapter, which starts as it has to, in the reference; move its vectors if `trained`."""
        self.reference.add(name, settings, self.model)
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
    def refused(self, match: str) -> Iterator[None]:
        """The block raises a ValueError, and nothing about the model has changed."""
        before = snapshot(self.model)
        with pytest.raises(ValueError, match=match):
            yield
        assert_unchanged(self.model, before)

    def _check_optimizers_keep_working(self) -> None:
        """The parameters of adapters stay the same objects, which is all that an optimizer knows of them."""
        now = vectors_of(self.model)
        assert not [place for place, parameter in self.known.items() if place in now and now[place] is not parameter]
        self.known = now

    # Which adapters there are, and what they do to the base.

    @initialize(
        settings=some_settings,
        dtype=st.sampled_from(DTYPES),
        trained=st.booleans(),
    )
    def begin(self, settings: Settings, dtype: torch.dtype, trained: bool) -> None:
        self.reference = Reference.of_base(dtype)
        self.wrap(mixed(dtype), settings, trained)

    @has_room
    @step(settings=some_settings, trained=st.booleans())
    def add(self, settings: Settings, trained: bool) -> None:
        name = self.free_name()
        with self.unmerges():
            self.model.add_adapter(name, settings.config())
        self.take_over_new(name, settings, trained)

    @has_adapters
    @step(names=several, trained=st.booleans())
    def switch(self, names: list[str], trained: bool) -> None:
        with self.unmerges():
            if len(names) == 1:
                self.model.set_adapter(names[0], inference_mode=not trained)
            else:
                self.model.base_model.set_adapter(names, inference_mode=not trained)
        self.reference.activate(names, trained)

    @has_adapters
    @step(name=present)
    def delete(self, name: str) -> None:
        if any(name in merged for merged in self.reference.merged.values()):
            with self.refused("while they are merged"):
                self.model.delete_adapter(name)
            return
        replaced = self.reference.active == [name] and len(self.reference.adapters) > 1
        with pytest.warns(UserWarning, match="which is now deleted") if replaced else nullcontext():
            self.model.delete_adapter(name)
        self.reference.delete(name)

    @step(enabled=st.booleans())
    def enable(self, enabled: bool) -> None:
        tuner = self.model.base_model
        tuner.enable_adapter_layers() if enabled else tuner.disable_adapter_layers()
        self.reference.enable(enabled)

    @has_adapters
    @step()
    def merge_active(self) -> None:
        self.merge(None)

    @has_adapters
    @step(names=several, one_by_one=st.booleans())
    def merge_some(self, names: list[str], one_by_one: bool) -> None:
        for part in [[name] for name in names] if one_by_one else [names]:
            self.merge(part)

    @precondition(lambda machine: machine.reference.merged)
    @step()
    def unmerge(self) -> None:
        self.model.unmerge_adapter()
        self.reference.unmerge()

    def merge(self, names: list[str] | None) -> None:
        exact = self.reference.merged_weights(self.model, self.reference.merge(names))
        with self.merging():
            self.model.merge_adapter(names)
        take_over_merged(base_of(self.model), exact, self.reference)

    def wrap(self, base: torch.nn.Module, settings: Settings, trained: bool) -> None:
        """Adapt a plain base."""
        self.adopt(get_peft_model(base, settings.config(), adapter_name=NAMES[0]).train())
        self.reference.training = True
        self.take_over_new(NAMES[0], settings, trained)
        self.reference.activate([NAMES[0]])
        self.save_one(NAMES[0])

    # What is made of the vectors of adapters.

    @has_adapters
    @step(name=present, strength=st.sampled_from([0.0, 0.5, 1.0, 1.5]), data=st.data())
    def set_strength(self, name: str, strength: float, data: st.DataObject) -> None:
        adapter = self.reference.adapters[name]
        weight = data.draw(st.none() | st.sampled_from(sorted(adapter.vectors)), label="weight")
        asked = strength if weight is None else {weight.removesuffix(".weight"): strength}
        if any(name in merged for merged in self.reference.merged.values()):
            with self.refused("is merged"):
                self.model.base_model.set_strength(asked, name)
            return
        self.model.base_model.set_strength(asked, name)
        adapter.strength |= dict.fromkeys(adapter.vectors if weight is None else [weight], strength)

    # What leaves a model and comes back.

    @wrapper_is_usable
    @has_adapters
    @step(name=present)
    def save(self, name: str) -> None:
        self.save_one(name)

    @wrapper_is_usable
    @has_saved
    @has_room
    @step(saved=some_saved, trainable=st.booleans(), meta_first=st.booleans())
    def load(self, saved: Saved, trainable: bool, meta_first: bool) -> None:
        name = self.free_name()
        with self.unmerges():
            self.model.load_adapter(saved.folder, name, is_trainable=trainable, low_cpu_mem_usage=meta_first)
        self.reference.add(name, saved.adapter.settings, self.model)
        self.enter_loaded(name, saved)
        self.reference.adapters[name].strength = dict(saved.adapter.strength)
        self.reference.adapters[name].trained = trainable
        self.reference.training &= trainable

    @step(way=st.sampled_from(sorted(COPIES)), go_on_with_copy=st.booleans())
    def copy(self, way: str, go_on_with_copy: bool) -> None:
        original, copied = self.model, COPIES[way](self.model)
        self.adopt(copied if go_on_with_copy else original)
        spoil(original if go_on_with_copy else copied)

    # What a model computes, forwards and backwards.

    @has_adapters
    @step(names=several)
    def switch_and_train(self, names: list[str]) -> None:
        with self.unmerges():
            self.model.base_model.set_adapter(names)
        self.reference.activate(names)
        self.train()

    @step()
    def train(self) -> None:
        """A step of an optimizer, with gradients that were compared."""
        if self.reference.training and self.reference.trains_merged():
            before = snapshot(self.model)
            with pytest.raises(RuntimeError, match="adapters are merged"):
                forward(self.model)
            assert_unchanged(self.model, before)
            return
        gradients = check_gradients(self.model, self.reference)
        if not gradients:
            return
        vectors = vectors_of(self.model)
        torch.optim.SGD([vectors[place] for place in gradients], lr=LEARNING_RATE).step()
        for place in gradients:
            self.reference.adapters[place.adapter].vectors[place.weight][place.vector] = vectors[place].detach().clone()

    @step(dtype=drawn(lambda machine: [d for d in DTYPES if d != machine.reference.dtype]), device=st.booleans())
    def cast(self, dtype: torch.dtype, device: bool) -> None:
        self.model.to("cpu", dtype) if device else self.model.to(dtype)
        self.reference.cast(dtype)

    @step(training=st.booleans())
    def set_mode(self, training: bool) -> None:
        self.model.train(training)
        self.reference.training = training

    @wrapper_is_usable
    @step(data=st.data(), go_on=st.booleans())
    def mixed_batch(self, data: st.DataObject, go_on: bool) -> None:
        adapters = sorted(self.reference.adapters)
        if go_on:
            # Nothing but merged adapters can be in the way then.
            self.model.eval()
            self.reference.training = False
            adapters = [name for name in adapters if self._is_called(name)]
        names = data.draw(st.lists(st.sampled_from([BASE, *adapters]), min_size=ROWS, max_size=ROWS))
        if self.reference.training:
            with self.refused("inference only"):
                forward(self.model, adapter_names=names)
        elif self.reference.merged or not all(self._is_called(name) for name in names if name != BASE):
            with self.refused(MIXED):
                forward(self.model, adapter_names=names)
        else:
            with torch.no_grad():
                actual = forward(self.model, adapter_names=names)
            alone = {n: self.reference.outputs(self.model, [n] if self.reference.enabled else []) for n in {*names}}
            check_close(actual, torch.stack([alone[n][row] for row, n in enumerate(names)]), self.reference)

    def _is_called(self, name: str) -> bool:
        return all(WEIGHTS[weight].called for weight in self.reference.adapters[name].vectors)

    # Writes, with or without PyTorch's knowledge, and passes in other circumstances.

    @has_adapters
    @step(name=present, vector=st.sampled_from(VECTORS), way=st.sampled_from(sorted(WAYS)))
    def write_vectors(self, name: str, vector: str, way: str) -> None:
        if any(name in merged for merged in self.reference.merged.values()):
            return  # what is merged stays as it was
        for place, parameter in vectors_of(self.model).items():
            if place.adapter == name and place.vector == vector:
                WAYS[way](parameter, 1.1 * parameter.detach() + 0.01)
                self.reference.adapters[name].vectors[place.weight][vector] = parameter.detach().clone()

    @precondition(lambda machine: not machine.reference.merged)
    @step(weight=st.sampled_from(sorted(WEIGHTS)), way=st.sampled_from(COUNTED))
    def write_a_weight(self, weight: str, way: str) -> None:
        parameter = base_of(self.model)[weight]
        factors = torch.linspace(0.9, 1.1, parameter.numel(), dtype=parameter.dtype).view_as(parameter)
        WAYS[way](parameter, parameter.detach() * factors)
        self.reference.stored[weight] = parameter.detach().clone()
        self.saved.clear()  # of another base, which may be taken for this one or not


@torch.no_grad()
def spoil(model: nn.Module) -> None:
    """Overwrite every tensor of a model that is not needed any more: nothing else may depend on it."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.fill_(float("nan"))
