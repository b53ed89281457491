"""Rules of the surgery histories: models are trained, cast, compiled, and run with an adapter for every row."""

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition
from torch import Tensor

from tests.tuner.models_compared import assert_unchanged, snapshot
from tests.tuner.surgery.surgery_base import DTYPES, SurgeryBase, drawn, has_adapters, several, step, wrapper_is_usable
from tests.tuner.surgery.surgery_checks import (
    GRADIENTS,
    base_of,
    check_close,
    check_gradients,
    forward,
    layers_of,
    vectors_of,
)
from tests.tuner.surgery.surgery_model import TOKENS, WEIGHTS

BASE = "__base__"
"""PEFT's name for "no adapter" in a batch."""
MIXED = "called row by row|while adapters are merged"
ROWS = len(TOKENS)
LEARNING_RATE, DAMPING = 0.05, 0.1


class PassRules(SurgeryBase):
    """What a model computes, forwards and backwards."""

    @has_adapters
    @step(names=several, adam=st.booleans(), decay=st.sampled_from([0.0, 0.1]))
    def switch_and_train(self, names: list[str], adam: bool, decay: float) -> None:
        with self.unmerges():
            self.model.base_model.set_adapter(names)
        self.reference.activate(names)
        self.train(adam=adam, decay=decay)

    @step(adam=st.booleans(), decay=st.sampled_from([0.0, 0.1]))
    def train(self, adam: bool, decay: float) -> None:
        if self.reference.training and self.reference.trains_merged():
            self.count("refused: train what is merged")
            before = snapshot(self.model)
            with pytest.raises(RuntimeError, match="adapters are merged"):
                forward(self.model)
            assert_unchanged(self.model, before)
            return
        self.count("train")
        of_vectors, of_weights = check_gradients(self.model, self.reference)
        now, base = vectors_of(self.model), base_of(self.model)
        trained = [(now[place], gradient) for place, gradient in of_vectors.items()]
        # Merged weights are put back to what they were, so training them would be lost.
        weights = {} if self.reference.merged else of_weights
        trained += [(base[weight], gradient) for weight, gradient in weights.items()]
        if not trained:
            return
        expected = [stepped(parameter, gradient, adam, decay) for parameter, gradient in trained]
        # An eps of the gradients' size keeps Adam's first step a smooth function of them.
        kind, options = (torch.optim.AdamW, {"eps": DAMPING}) if adam else (torch.optim.SGD, {})
        parameters = [parameter for parameter, _ in trained]
        kind(parameters, lr=LEARNING_RATE, weight_decay=decay, **options).step()
        slack = LEARNING_RATE * GRADIENTS[self.reference.dtype] * self.reference.slack / (DAMPING if adam else 1)
        slack *= sum(float(gradient.norm()) for _, gradient in trained)
        for (parameter, _), value in zip(trained, expected, strict=True):
            rounding = torch.finfo(parameter.dtype).eps * value.abs()
            assert ((parameter.double() - value).abs() <= rounding + slack).all()
        for place in of_vectors:
            self.reference.adapters[place.adapter].vectors[place.weight][place.vector] = now[place].detach().clone()
        if weights:
            self.saved.clear()  # of another base, which may be taken for this one or not
        for weight in weights:
            self.reference.stored[weight] = base[weight].detach().clone()

    @precondition(lambda machine: not machine.reference.tied)
    @step(trained=st.booleans())
    def train_the_base_too(self, trained: bool) -> None:
        self.count("train the base too" if trained else "freeze the base")
        base = base_of(self.model)
        for weight in WEIGHTS:
            base[weight].requires_grad_(trained)
        self.reference.base_trained = trained

    @step(dtype=drawn(lambda machine: [d for d in DTYPES if d != machine.reference.dtype]), device=st.booleans())
    def cast(self, dtype: torch.dtype, device: bool) -> None:
        self.count(f"cast to {dtype}" + (" while merged" if self.reference.merged else ""))
        self.model.to("cpu", dtype) if device else self.model.to(dtype)
        self.reference.cast(dtype)

    @step(by_name=st.booleans())
    def move(self, by_name: bool) -> None:
        self.count("move")
        self.model.cpu() if by_name else self.model.to("cpu")

    @step(training=st.booleans())
    def set_mode(self, training: bool) -> None:
        self.count("train mode" if training else "eval mode")
        self.model.train(training)
        self.reference.training = training

    @wrapper_is_usable
    @step(data=st.data(), go_on=st.booleans())
    def mixed_batch(self, data: st.DataObject, go_on: bool) -> None:
        if go_on:
            self.model.eval()
            self.reference.training = False
        available = st.sampled_from([BASE, *sorted(self.reference.adapters)])
        names = data.draw(st.lists(available, min_size=ROWS, max_size=ROWS))
        if self.reference.training:
            with self.refused("mixed batch in training", "inference only"):
                forward(self.model, adapter_names=names)
        elif any(not WEIGHTS[weight].called for name in names if name != BASE for weight in self.weights(name)):
            with self.refused("mixed batch of adapters of parameters", MIXED):
                forward(self.model, adapter_names=names)
        elif self.reference.merged:
            with self.refused("mixed batch while merged", MIXED):
                forward(self.model, adapter_names=names)
        else:
            self.count("mixed batch")
            with torch.no_grad():
                actual = forward(self.model, adapter_names=names)
            rows = [self.reference.outputs([n] if self.reference.enabled else [])[k] for k, n in enumerate(names)]
            check_close(actual, torch.stack(rows), self.reference)

    @wrapper_is_usable
    @precondition(lambda machine: not machine.reference.training)
    @precondition(lambda machine: any(WEIGHTS[weight].called for weight in layers_of(machine.model)))
    @step(names=st.sampled_from([[BASE] * (ROWS + 1), [], ["nobody"] * ROWS]))
    def mixed_batch_of_nonsense(self, names: list[str]) -> None:
        with self.refused("mixed batch of nonsense", f"entries|no adapter is named|{MIXED}"):
            forward(self.model, adapter_names=names)

    def weights(self, name: str) -> list[str]:
        return list(self.reference.adapters[name].vectors)

    # ---- compiled

    @has_adapters
    @precondition(lambda machine: machine.compiled is None and machine.compiled_passes_left)
    @step(backend=st.sampled_from(["eager", "aot_eager"]))
    def compile(self, backend: str) -> None:
        self.count("compile")
        torch._dynamo.reset()
        self.compiled = torch.compile(self.model.base_model.model, backend=backend, fullgraph=True)


def stepped(parameter: Tensor, gradient: Tensor, adam: bool, decay: float) -> Tensor:
    """The first step of AdamW (which decays apart from the gradient) or of SGD (which does not), from the formulas."""
    before = parameter.detach().double()
    if adam:
        return before * (1 - LEARNING_RATE * decay) - LEARNING_RATE * gradient / (gradient.abs() + DAMPING)
    return before - LEARNING_RATE * (gradient + decay * before)
