"""A small mixed model after any operations in any order, compared after every step with a dense float64 model.

Adapters are added, trained, switched, merged, cast, copied, saved, loaded and written to. The base and the vectors are
known to the last bit (what rounding leaves open, a trained vector, is checked against float64 and then taken over);
outputs and gradients are those of the dense method on them.
"""

import copy
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import wraps
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from dvora import DVoRAConfig, MergePrecisionWarning
from dvora.peft import DVoRALayer
from tests.cases import COPIES
from tests.histories.model import COEFFICIENTS, PARAMETERS, TARGETS, TOKENS, mixed
from tests.peft.dense_weights import DenseModel, parameter_name
from tests.peft.models_compared import assert_unchanged, snapshot, worst_difference
from tests.peft.tiny import dvora_layers, same_bits

SHORT, LONG, STEPS = 12, 500, 20
"""Histories in a short run and in a long one, and the most steps of a history."""
NAMES = ("first", "second", "third", "fourth")
VECTORS = ("magnitude", "lambda_b", "lambda_d")
OUTPUTS = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 0.06}
"""Largest error of the outputs, relative to the largest output."""
GRADIENTS = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Largest error of a gradient, relative to the norm of all gradients of its kind."""
WAYS: dict[str, Callable[[nn.Parameter, Tensor], object]] = {
    "in place": torch.no_grad()(lambda parameter, value: parameter.copy_(value)),
    "data assigned": lambda parameter, value: setattr(parameter, "data", value),
    "in inference mode": torch.inference_mode()(lambda parameter, value: parameter.copy_(value)),
}

configs = st.fixed_dictionaries(
    {
        "targets": st.lists(st.sampled_from(TARGETS), min_size=1, unique=True),
        "r": st.sampled_from([3, 1, 7]),
        "alpha": st.sampled_from([None, 2.0]),
        "direction": st.sampled_from(["unit", "weight"]),
        "detach_norm": st.booleans(),
        "projection_seed": st.sampled_from([0, 1]),
        "train": st.sampled_from([VECTORS, ("magnitude",), ("lambda_b", "lambda_d")]),
        "strength": st.sampled_from([1.0, 0.5]),
    }
)


@dataclass
class Adapter:
    """What is known of an adapter: its vectors by weight and name, which of them its configuration trains, and when."""

    vectors: dict[str, dict[str, Tensor]]
    train: Sequence[str]
    strength: float
    trained: bool = False


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


present = drawn(lambda machine: sorted(machine.adapters))
several = st.runner().flatmap(lambda m: st.lists(st.sampled_from(sorted(m.adapters)), min_size=1, unique=True))
has_adapters = precondition(lambda machine: bool(machine.adapters))
has_room = precondition(lambda machine: len(machine.adapters) < len(NAMES))
# PEFT's wrapper remembers one active adapter by name, also when that one was deleted and several or none are active.
wrapper_is_usable = precondition(lambda machine: machine.model.active_adapter in machine.adapters)


def loss(outputs: Tensor) -> Tensor:
    return (outputs * COEFFICIENTS.to(outputs.dtype)).sum()


class Histories(RuleBasedStateMachine):
    """`self.model` must always be what the other attributes say."""

    model: PeftModel

    def __init__(self) -> None:
        super().__init__()
        self.previous = ""
        self.adapters: dict[str, Adapter] = {}
        self.active: list[str] = []
        self.merged: list[str] = []
        self.rounded: set[torch.dtype] = set()
        """The dtypes that merged weights have been in."""
        self.enabled = self.training = True
        self.saved: list[tuple[Path, Adapter]] = []
        self.known: dict[object, nn.Parameter] = {}
        self.folder = tempfile.TemporaryDirectory()

    def teardown(self) -> None:
        self.folder.cleanup()

    # What the model must be.

    @invariant()
    def model_is_what_it_must_be(self) -> None:
        if hasattr(self, "model"):
            for _ in range(2):  # no check may change anything
                self.check_state()
                self.check_outputs()

    def layers(self) -> dict[str, DVoRALayer]:
        return {parameter_name(path, layer): layer for path, layer in dvora_layers(self.model)}

    def vectors_of(self, name: str) -> dict[str, dict[str, nn.Parameter]]:
        layers = {weight: layer for weight, layer in self.layers().items() if name in layer.dvora_adapted}
        return {weight: layer.vectors(name)._asdict() for weight, layer in layers.items()}

    def merged_at(self, weight: str) -> list[str]:
        return [name for name in self.merged if weight in self.adapters[name].vectors]

    def in_effect(self, weight: str) -> list[str]:
        """The adapters with which a pass uses a weight."""
        active = [name for name in self.active if weight in self.adapters[name].vectors] if self.enabled else []
        return (self.merged_at(weight) if self.enabled else []) or active

    def check_state(self) -> None:
        """Every parameter to the last bit; what is active, merged, disabled, trained."""
        model = self.model
        assert list(model.peft_config) == list(self.adapters)
        assert (model.active_adapters, model.training) == (self.active, self.training)
        layers = self.layers()
        named = model.base_model.model.named_parameters()
        base = {name.replace(".base_layer", ""): value for name, value in named if ".dvora_" not in name}
        assert base.keys() == self.base.keys()
        for name, value in base.items():
            assert not value.requires_grad
            assert same_bits(layers[name].unmerged() if name in layers else value, self.base[name]), name
            assert same_bits(value, self.base[name]) or self.merged_at(name), name
        for weight, layer in layers.items():
            assert layer.merged_adapters == self.merged_at(weight), weight
            assert (layer.active_adapters, layer.disable_adapters) == (self.active, not self.enabled), weight
        now: dict[object, nn.Parameter] = {}
        for name, adapter in self.adapters.items():
            found = self.vectors_of(name)
            assert found.keys() == adapter.vectors.keys()
            for weight, vectors in found.items():
                assert float(layers[weight].strength(name)) == adapter.strength
                for vector, value in vectors.items():
                    assert same_bits(value, adapter.vectors[weight][vector]), (name, weight, vector)
                    assert value.requires_grad == (adapter.trained and vector in adapter.train), (name, vector)
                    now[name, weight, vector] = value
        # An optimizer knows nothing of parameters but the objects, which stay the same.
        assert all(now.get(place, value) is value for place, value in self.known.items())
        self.known = now

    def check_outputs(self) -> None:
        with torch.no_grad():
            actual = self.forward()
        assert actual.dtype == self.dtype
        assert worst_difference(actual, self.dense()(TOKENS)) < self.tolerance(OUTPUTS)

    def forward(self) -> Tensor:
        """A pass, past PEFT's wrapper where that remembers an adapter that was deleted; disabled, it unmerges."""
        outer = self.model if self.model.active_adapter in self.model.peft_config else self.model.base_model
        outputs: Tensor = outer(TOKENS)
        if not self.enabled:
            self.merged.clear()
        return outputs

    def dense(self) -> DenseModel:
        """The dense method, every weight with the adapters in effect."""
        base = mixed(torch.float64)
        base.load_state_dict({name: value.double() for name, value in self.base.items()})
        dense = DenseModel(base, self.model, list(self.adapters))
        for weight, one in list(dense.weights.items()):
            at = [name for name in self.adapters if weight in self.adapters[name].vectors]
            chosen = [at.index(name) for name in self.in_effect(weight)]
            parts = {"adapters": [one.adapters[i] for i in chosen], "strengths": [one.strengths[i] for i in chosen]}
            dense.weights[weight] = one._replace(**parts)
            if not chosen:
                del dense.weights[weight]
        return dense

    def tolerance(self, by_dtype: dict[torch.dtype, float]) -> float:
        dtypes = {self.dtype, *(self.rounded if self.merged else ())}
        return max(by_dtype[dtype] for dtype in dtypes) * self.slack()

    @torch.no_grad()
    def slack(self) -> float:
        """By how much worse than usual rounding may be: where updates nearly cancel rows, or dwarf them."""
        worst = 1.0
        for one in self.dense().weights.values():
            for adapter in one.adapters:
                ratio = adapter.norm_ratio()[adapter.weight.norm(dim=1) > 0]
                worst = max(worst, 0.03 * float(torch.maximum(ratio, 1 / ratio).max()))
        return worst

    # Which adapters there are.

    def free_name(self) -> str:
        return next(name for name in NAMES if name not in self.adapters)

    def unmerges(self) -> AbstractContextManager[object]:
        """The block takes merged adapters out, and says so."""
        merged = bool(self.merged)
        self.merged = []
        return pytest.warns(UserWarning, match="Unmerging the model first") if merged else nullcontext()

    def config(self, targets: list[str], **options: object) -> DVoRAConfig:
        modules, parameters = ([t for t in targets if (t in PARAMETERS) == by_name] for by_name in (False, True))
        return DVoRAConfig(target_modules=modules, target_parameters=parameters, **options)

    @torch.no_grad()
    def enter_new(self, name: str, config: dict[str, object]) -> None:
        """Move the vectors of a new adapter away from its start, and know them."""
        generator = torch.Generator().manual_seed(NAMES.index(name))
        known: dict[str, dict[str, Tensor]] = {}
        for weight, vectors in self.vectors_of(name).items():
            for value in vectors.values():
                value.add_(0.3 * torch.randn(value.shape, generator=generator))
            known[weight] = {vector: value.detach().clone() for vector, value in vectors.items()}
        self.adapters[name] = Adapter(known, config["train"], config["strength"])

    def activate(self, names: list[str], trained: bool = True) -> None:
        self.active = list(names)
        for name, adapter in self.adapters.items():
            adapter.trained = trained and name in names

    @initialize(config=configs, dtype=st.sampled_from(list(OUTPUTS)))
    def begin(self, config: dict[str, object], dtype: torch.dtype) -> None:
        self.dtype, base = dtype, mixed(dtype)
        self.base = {name: value.detach().clone() for name, value in base.named_parameters()}
        self.model = get_peft_model(base, self.config(**config), adapter_name=NAMES[0]).train()
        self.enter_new(NAMES[0], config)
        self.activate([NAMES[0]])

    @has_room
    @step(config=configs)
    def add(self, config: dict[str, object]) -> None:
        name = self.free_name()
        with self.unmerges():
            self.model.add_adapter(name, self.config(**config))
        self.enter_new(name, config)

    @has_adapters
    @step(names=several, trained=st.booleans())
    def switch(self, names: list[str], trained: bool) -> None:
        tuner = self.model if len(names) == 1 else self.model.base_model
        with self.unmerges():
            tuner.set_adapter(names[0] if len(names) == 1 else names, inference_mode=not trained)
        self.activate(names, trained)

    @has_adapters
    @step(name=present)
    def delete(self, name: str) -> None:
        if name in self.merged:
            self.check_refused(lambda: self.model.delete_adapter(name), "while they are merged")
            return
        replaced = self.active == [name] and len(self.adapters) > 1
        with pytest.warns(UserWarning, match="which is now deleted") if replaced else nullcontext():
            self.model.delete_adapter(name)
        del self.adapters[name]
        if name in self.active:
            # Where it was the only active one, the first of the others takes its place.
            self.activate([other for other in self.active if other != name] or sorted(self.adapters)[:1])

    def check_refused(self, act: Callable[[], object], message: str) -> None:
        before = snapshot(self.model)
        with pytest.raises((ValueError, RuntimeError), match=message):
            act()
        assert_unchanged(self.model, before)

    # What they do to the base.

    @step(enabled=st.booleans())
    def enable(self, enabled: bool) -> None:
        tuner = self.model.base_model
        tuner.enable_adapter_layers() if enabled else tuner.disable_adapter_layers()
        self.enabled = enabled
        # PEFT has disabled adapters trained never and enabled ones always.
        self.activate(self.active, trained=enabled)

    @has_adapters
    @step(names=st.none() | several, one_by_one=st.booleans())
    def merge(self, names: list[str] | None, one_by_one: bool) -> None:
        self.rounded = {*(self.rounded if self.merged else ()), self.dtype}
        for part in [[name] for name in names] if names and one_by_one else [names]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", MergePrecisionWarning)
                for message in ("Already following adapters were merged", "All adapters are already merged"):
                    warnings.filterwarnings("ignore", message)
                self.model.merge_adapter(part)
            self.merged += [name for name in (self.active if part is None else part) if name not in self.merged]

    @precondition(lambda machine: machine.merged)
    @step()
    def unmerge(self) -> None:
        self.model.unmerge_adapter()
        self.merged = []

    @has_adapters
    @step(name=present, strength=st.sampled_from([0.0, 0.5, 1.0, 1.5]))
    def set_strength(self, name: str, strength: float) -> None:
        if name in self.merged:
            self.check_refused(lambda: self.model.base_model.set_strength(strength, name), "is merged")
            return
        self.model.base_model.set_strength(strength, name)
        self.adapters[name].strength = strength

    # What leaves a model and comes back.

    @wrapper_is_usable
    @has_adapters
    @step(name=present)
    def save(self, name: str) -> None:
        folder = Path(self.folder.name, str(len(self.saved)))
        self.model.save_pretrained(str(folder), selected_adapters=[name])
        self.saved.append((folder / name, copy.deepcopy(self.adapters[name])))

    @wrapper_is_usable
    @has_room
    @precondition(lambda machine: bool(machine.saved))
    @step(saved=drawn(lambda machine: machine.saved), trainable=st.booleans(), meta_first=st.booleans())
    def load(self, saved: tuple[Path, Adapter], trainable: bool, meta_first: bool) -> None:
        name, (folder, adapter) = self.free_name(), saved
        with self.unmerges():
            self.model.load_adapter(folder, name, is_trainable=trainable, low_cpu_mem_usage=meta_first)
        self.adapters[name] = copy.deepcopy(adapter)
        self.adapters[name].trained = trainable
        self.cast_vectors(name)
        self.training &= trainable

    @step(way=st.sampled_from(sorted(COPIES)), go_on_with_copy=st.booleans())
    def copy(self, way: str, go_on_with_copy: bool) -> None:
        copied = COPIES[way](self.model)
        self.model, other = (copied, self.model) if go_on_with_copy else (self.model, copied)
        self.known.clear()
        # Nothing may depend on the other one.
        with torch.no_grad():
            for tensor in (*other.parameters(), *other.buffers()):
                tensor.fill_(float("nan"))

    # Training, casts, and writes with or without PyTorch's knowledge.

    @step()
    def train(self) -> None:
        """A step of an optimizer, with gradients that were compared."""
        trained = {name for name, adapter in self.adapters.items() if adapter.trained}
        if self.training and self.enabled and trained & {*self.merged}:
            self.check_refused(self.forward, "adapters are merged")
            return
        dense, tolerance = self.dense(), self.tolerance(GRADIENTS)
        loss(dense(TOKENS)).backward()
        self.model.zero_grad()
        if (value := loss(self.forward())).requires_grad:
            value.backward()
        for vector in VECTORS:
            compared = [
                (self.vectors_of(name)[weight][vector], getattr(adapter, vector).grad)
                for weight, one in dense.weights.items()
                for name, adapter in zip(self.in_effect(weight), one.adapters, strict=True)
                if name in trained and vector in self.adapters[name].train and name not in self.merged
            ]
            size = sum(float(expected.norm()) ** 2 for _, expected in compared) ** 0.5
            for parameter, expected in compared:
                error = float((parameter.grad.double() - expected).norm())
                assert error <= tolerance * size, (vector, error / size)
        torch.optim.SGD(self.model.parameters(), lr=0.05).step()
        for name in trained:
            self.take_over(name)

    def take_over(self, name: str) -> None:
        """Know the vectors of an adapter as they are now."""
        for weight, vectors in self.vectors_of(name).items():
            self.adapters[name].vectors[weight] = {k: v.detach().clone() for k, v in vectors.items()}

    @step(dtype=drawn(lambda machine: [d for d in OUTPUTS if d != machine.dtype]), device=st.booleans())
    def cast(self, dtype: torch.dtype, device: bool) -> None:
        self.model.to("cpu", dtype) if device else self.model.to(dtype)
        self.rounded.add(dtype)
        self.dtype, self.base = dtype, {name: value.to(dtype) for name, value in self.base.items()}
        for name in self.adapters:
            self.cast_vectors(name)

    def cast_vectors(self, name: str) -> None:
        """Vectors are never kept below float32."""
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        vectors = self.adapters[name].vectors
        vectors |= {weight: {k: v.to(wide) for k, v in three.items()} for weight, three in vectors.items()}

    @step(training=st.booleans())
    def set_mode(self, training: bool) -> None:
        self.model.train(training)
        self.training = training

    @has_adapters
    @step(name=present, vector=st.sampled_from(VECTORS), way=st.sampled_from(sorted(WAYS)))
    def write_vectors(self, name: str, vector: str, way: str) -> None:
        if name not in self.merged:  # what is merged stays as it was
            for vectors in self.vectors_of(name).values():
                WAYS[way](vectors[vector], 1.1 * vectors[vector].detach() + 0.01)
            self.take_over(name)

    @precondition(lambda machine: not machine.merged)
    @step(way=st.sampled_from(sorted(WAYS)), data=st.data())
    def write_a_weight(self, way: str, data: st.DataObject) -> None:
        layers = self.layers()
        weight = data.draw(st.sampled_from(sorted(layers))) if layers else "head.weight"
        named = self.model.base_model.model.named_parameters()
        parameter = next(value for name, value in named if name.replace(".base_layer", "") == weight)
        factors = torch.linspace(0.9, 1.1, parameter.numel(), dtype=parameter.dtype).view_as(parameter)
        WAYS[way](parameter, parameter.detach() * factors)
        self.base[weight] = parameter.detach().clone()
        self.saved.clear()  # of another base, which may be taken for this one or not


def test_after_every_step_the_model_is_what_the_dense_model_says(request: pytest.FixtureRequest) -> None:
    is_long = request.config.getoption("--fuzz")
    run_state_machine_as_test(
        Histories,
        settings=settings(
            max_examples=LONG if is_long else SHORT,
            stateful_step_count=STEPS,
            suppress_health_check=list(HealthCheck),  # histories take longer and draw more than single examples
            report_multiple_bugs=False,
            derandomize=not is_long,
        ),
    )
