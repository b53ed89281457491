"""A pytest plugin that puts DVoRA into PEFT's test modules, without a change to their files.

A list of cases that has LoRA's or VeRA's gets DVoRA's instead, and those tests run. Tests without such a list, but in
`selection.toml`, run with DVoRA in LoRA's place: the name LoraConfig in their module makes our configuration.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack
from importlib import import_module
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch

from conformance.cases import further_rows
from conformance.counterparts import METHODS, InPlaceOfLora, NoCounterpartError, counterpart, mentions
from conformance.stand_ins import stand_ins
from conformance.table import HERE, Table
from dvora import DVoRAConfig
from dvora.peft.layer import DVoRALayer
from dvora.peft.parameters import ParamWrapper

IN_PLACE_OF = {"LoraConfig": InPlaceOfLora, "LoraLayer": DVoRALayer, "ParamWrapper": ParamWrapper}
# Functions of theirs that skip a test for methods that they know by name, and for all others.
NOT_FOR_US = (("testing_common", "_skip_if_conv1d_not_supported"), ("test_decoder_models", "check_beft_config"))
# What PEFT grants to methods by their name in single tests: to take part at all, or the rounding of convolutions.
GRANTED_TO = {
    "test_mixed_adapter_batches": ["LoraConfig"],
    "test_generate_with_mixed_adapter_batches": ["LoraConfig"],
    "test_safe_merge": ["HiraConfig", "LoHaConfig"],
}
SELECTION = Table.read(HERE / "selection.toml")


class _AlwaysCached(dict[str, int]):
    """The hub ids that PEFT's tests take from the cache instead of asking a hub: all."""

    def __contains__(self, hub_id: object) -> bool:
        return True

    def __missing__(self, hub_id: str) -> int:
        return 0


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Import the test modules."""
    torch.set_num_threads(1)
    with stand_ins():
        return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Exchange the cases of a test before pytest makes tests of them."""
    marks = metafunc.definition.own_markers
    marks[:] = [_with_our_cases(mark) if mark.name == "parametrize" else mark for mark in marks]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests that DVoRA takes part in."""
    SELECTION.check_all_used(items, config)
    ours = {item: _is_ours(item) for item in items}
    kept = [item for item in items if ours[item]]
    config.hook.pytest_deselected(items=[item for item in items if not ours[item]])
    items[:] = kept
    for module in {_module(item) for item in kept}:
        vars(module).update({name: ours for name, ours in IN_PLACE_OF.items() if name in vars(module)})
    vars(import_module("tests.testing_utils"))["_HUB_MODEL_ACCESSES"] = _AlwaysCached()
    for module_name, function in NOT_FOR_US:
        setattr(import_module(f"tests.{module_name}"), function, lambda *_: None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Run a test as if DVoRA were on PEFT's lists of names; many tests start from torch's generator as they find it."""
    torch.manual_seed(0)
    with ExitStack() as patches:
        for name in GRANTED_TO.get(item.name.partition("[")[0], ()):
            for module in (import_module("tests.testing_common"), _module(item)):
                if name in vars(module):
                    patches.enter_context(mock.patch.object(module, name, DVoRAConfig))
        return (yield)


def _with_our_cases(mark: pytest.Mark) -> pytest.Mark:
    names, rows = mark.args
    ours: dict[str, Any] = {}
    for row in rows:
        values = row.values if hasattr(row, "marks") else row
        if not mentions(METHODS, values):
            continue
        try:
            case = counterpart(values)
        except NoCounterpartError:
            continue
        # LoRA and VeRA have cases in common, under two names.
        differs_in = case[1:] if isinstance(case, tuple) and isinstance(case[0], str) else case
        ours.setdefault(repr(differs_in), case)
    if not ours:
        return mark
    cases = list(ours.values())
    names = names if isinstance(names, str) else ",".join(names)
    kept = {key: value for key, value in mark.kwargs.items() if key != "ids"}
    return pytest.mark.parametrize(names, [*cases, *further_rows(names, cases)], **kept).mark


def _is_ours(item: pytest.Item) -> bool:
    if SELECTION.entry("left_out", item):
        return False
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return mentions((DVoRAConfig,), tuple(parameters)) or SELECTION.entry("in_place_of_lora", item) is not None


def _module(item: pytest.Item) -> ModuleType:
    assert isinstance(item, pytest.Function)
    module = item.module
    assert isinstance(module, ModuleType)
    return module
