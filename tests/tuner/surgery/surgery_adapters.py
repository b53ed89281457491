"""Rules of the surgery histories: adapters are added, switched, disabled, merged and deleted."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition
from peft import LoraConfig, PeftModel, get_peft_model

from dvora import DVoRAConfig
from tests.tuner.surgery.surgery_base import (
    DTYPES,
    NAMES,
    SurgeryBase,
    has_adapters,
    has_room,
    present,
    several,
    some_settings,
    step,
    wrapper_is_usable,
)
from tests.tuner.surgery.surgery_checks import base_of, check_close, forward, take_over_merged, vectors_of
from tests.tuner.surgery.surgery_model import mixed
from tests.tuner.surgery.surgery_reference import Reference
from tests.tuner.surgery.surgery_settings import VECTORS, Settings

NONSENSE: dict[str, tuple[Callable[[PeftModel, str], object], str]] = {
    "a taken name": (lambda m, n: m.add_adapter(n, DVoRAConfig(r=2, target_modules=["head"])), "already exists"),
    "no such layer": (lambda m, n: m.add_adapter("x", DVoRAConfig(r=2, target_modules=["haed"])), "closest: head"),
    "another method": (lambda m, n: m.add_adapter("x", LoraConfig(target_modules=["head"])), "Cannot combine"),
    "activate nobody": (lambda m, n: m.set_adapter("nobody"), "nobody"),
    "delete nobody": (lambda m, n: m.delete_adapter("nobody"), "nobody"),
    "scale nobody": (lambda m, n: m.base_model.set_strength(0.5, "nobody"), "nobody"),
    "scale no layer": (lambda m, n: m.base_model.set_strength({"nothing": 0.5}, n), "nothing"),
    "scale infinitely": (lambda m, n: m.base_model.set_strength(float("inf"), n), "finite"),
}
"""What is asked of a model with an adapter of some name, and what the refusal says."""


class AdapterRules(SurgeryBase):
    """Which adapters there are, and what they do to the base."""

    @initialize(
        settings=some_settings,
        dtype=st.sampled_from(DTYPES),
        trained=st.booleans(),
        tied=st.sampled_from([False, False, False, True]),
        compiles=st.sampled_from([False] * 5 + [True]),
    )
    def begin(self, settings: Settings, dtype: torch.dtype, trained: bool, tied: bool, compiles: bool) -> None:
        self.count("begin")
        self.compiled_passes_left = 3 if compiles else 0
        self.reference = Reference.of_base(dtype, tied)
        self.wrap(mixed(dtype, tied), settings, trained)

    @has_room
    @step(settings=some_settings, trained=st.booleans())
    def add(self, settings: Settings, trained: bool) -> None:
        self.count("add")
        name = self.free_name()
        with self.unmerges():
            self.model.add_adapter(name, settings.config())
        self.take_over_new(name, settings, trained)

    @has_adapters
    @step(names=several, trained=st.booleans())
    def switch(self, names: list[str], trained: bool) -> None:
        self.count(f"switch to {'one' if len(names) == 1 else 'several'}")
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
            with self.refused("delete a merged adapter", "while they are merged"):
                self.model.delete_adapter(name)
            return
        self.count("delete")
        replaced = self.reference.active == [name] and len(self.reference.adapters) > 1
        with pytest.warns(UserWarning, match="which is now deleted") if replaced else nullcontext():
            self.model.delete_adapter(name)
        self.reference.delete(name)

    @has_adapters
    @step(names=several, trained=st.booleans())
    def set_requires_grad(self, names: list[str], trained: bool) -> None:
        self.count("set_requires_grad")
        self.model.base_model.set_requires_grad(names, trained)
        for name in names:
            self.reference.adapters[name].trained = trained

    @step(enabled=st.booleans())
    def enable(self, enabled: bool) -> None:
        self.count("enable" if enabled else "disable")
        tuner = self.model.base_model
        tuner.enable_adapter_layers() if enabled else tuner.disable_adapter_layers()
        self.reference.enable(enabled)

    @wrapper_is_usable
    @step(runs=st.booleans(), fails=st.booleans())
    def disable_for_a_while(self, runs: bool, fails: bool) -> None:
        self.count("disable for a while")
        was_enabled = self.reference.enabled
        with pytest.raises(KeyboardInterrupt) if fails else nullcontext(), self.model.disable_adapter():
            self.reference.enable(False)
            if runs:
                self.reference.unmerge()
                with torch.no_grad():
                    check_close(forward(self.model), self.reference.outputs(), self.reference)
            if fails:
                raise KeyboardInterrupt
        if was_enabled:
            self.reference.enable(True)

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
        self.count("unmerge")
        self.model.unmerge_adapter()
        self.reference.unmerge()

    @has_adapters
    @step(what=st.sampled_from(sorted(NONSENSE)), name=present)
    def ask_for_nonsense(self, what: str, name: str) -> None:
        ask, match = NONSENSE[what]
        with self.refused(what, match):
            ask(self.model, name)

    @has_adapters
    @step(name=present, vector=st.sampled_from(VECTORS))
    def merge_what_is_not_finite(self, name: str, vector: str) -> None:
        if any(name in merged for merged in self.reference.merged.values()):
            return  # there is nothing left to merge
        held = vectors_of(self.model)
        spoilt = next(v for place, v in held.items() if place.adapter == name and place.vector in (vector, "magnitude"))
        before = spoilt.detach().clone()
        with torch.no_grad():
            spoilt[0] = float("nan")
            with self.merging(), self.refused("merge what is not finite", "not finite|is tied"):
                self.model.merge_adapter([name])
            spoilt.copy_(before)

    @step(merge=st.booleans(), settings=some_settings, trained=st.booleans())
    def unload_and_wrap_again(self, merge: bool, settings: Settings, trained: bool) -> None:
        if merge and self.reference.adapts_tied(None):
            with self.refused("merge into a tied weight and unload", "is tied"):
                self.model.merge_and_unload()
            return
        self.count("merge and unload" if merge else "unload")
        with self.merging():
            base = self.model.merge_and_unload() if merge else self.model.unload()
        if merge:
            take_over_merged(dict(base.named_parameters()), self.reference.merge(None), self.reference)
        self.reference = self.reference.of_its_base()
        self.saved.clear()  # of another base, which may be taken for this one or not
        self.wrap(base, settings, trained)

    def merge(self, names: list[str] | None) -> None:
        if self.reference.adapts_tied(names):
            with self.refused("merge into a tied weight", "is tied"):
                self.model.merge_adapter(names)
            return
        self.count("merge the active adapters" if names is None else "merge some adapters")
        with self.merging():
            self.model.merge_adapter(names)
        take_over_merged(base_of(self.model), self.reference.merge(names), self.reference)

    def wrap(self, base: torch.nn.Module, settings: Settings, trained: bool) -> None:
        """Adapt a plain base."""
        self.adopt(get_peft_model(base, settings.config(), adapter_name=NAMES[0]).train())
        self.reference.training = True
        self.take_over_new(NAMES[0], settings, trained)
        self.reference.activate([NAMES[0]])
        self.save_one(NAMES[0])
