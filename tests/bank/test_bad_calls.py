"""Calls that a bank refuses: names, rows, pins, a base that was written to, a bank that is closed."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import dvora
from tests.bank.refusals import NAMES, refused
from tests.bank.tenants import Served, Tenants
from tests.peft.tiny import inputs, outputs

WRONG_NAMES: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (["a", "customer", "b"], {}, ValueError, "names: there is no adapter 'customer' among the 3 of the bank"),
    (["a", "bb"], {}, ValueError, "there is no adapter 'bb' among the 3 of the bank; the nearest is 'b'"),
    ("a", {}, TypeError, "names must be a list with one name a row, got 'a'"),
    ({"a"}, {}, TypeError, "names must be a list with one name a row"),
    (None, {}, TypeError, "names must be a list with one name a row, got None"),
    ([], {}, ValueError, "names is empty"),
    (["a", 3], {}, TypeError, "names must be strings, or None for the base, got 3"),
    (["a", ["b"]], {}, TypeError, r"names must be strings, or None for the base, got \['b'\]"),
    (["a"], {"repeats": 0}, ValueError, "repeats must be a positive integer, got 0"),
    (["a"], {"repeats": 1.5}, ValueError, "repeats must be a positive integer, got 1.5"),
    (["a"], {"repeats": True}, ValueError, "repeats must be a positive integer, got True"),
    (["a", "b", "c"], {}, ValueError, "a batch has 3 different adapters, and the bank 2 slots, 0 of them pinned"),
]


@pytest.mark.parametrize(("names", "options", "error", "message"), WRONG_NAMES, ids=str)
def test_wrong_rows(names: Any, options: dict[str, Any], error: type[Exception], message: str, served: Served) -> None:
    with refused(error, message), served.bank.rows(names, **options):
        raise AssertionError


@pytest.mark.parametrize("count", [1, 3, 5, 8])
def test_another_number_of_names_than_rows(count: int, served: Served) -> None:
    message = f"bank.rows got {count} names, and the layer a batch of 4 rows; give one name a row"
    with refused(ValueError, message), served.bank.rows(["a"] * count):
        served.model(inputs(served.model)["x"])
    with (
        refused(ValueError, r"2 names, each repeated 3 times, and the layer a batch of 4"),
        served.bank.rows(["a", "b"], repeats=3),
    ):
        served.model(inputs(served.model)["x"])


@pytest.mark.parametrize("method", ["pin", "unpin", "prefetch"])
def test_wrong_names(method: str, served: Served) -> None:
    call = getattr(served.bank, method)
    with refused(TypeError, "names must be a list of names, got 'a'"):
        call("a")
    with refused(TypeError, "names must be strings, got None"):
        call(["a", None])
    with refused(ValueError, "names: there is no adapter 'cc' .*; the nearest is 'c'"):
        call(["a", "cc"])
    assert served.bank.stats().pinned == 0


def test_wrong_single_names(served: Served, these: Tenants) -> None:
    bank = served.bank
    for call in (bank.remove, bank.digest, lambda name: bank.replace(name, these.path("a"))):
        with refused(ValueError, "there is no adapter 'aa' among the 3 of the bank; the nearest is 'a'"):
            call("aa")
        with refused(TypeError, "names must be strings, got 3"):
            call(3)
    for name in ("", None, 3, ["a"]):
        with refused(TypeError, "name must be a string that is not empty"):
            bank.add(name, these.path("a"))
    with refused(ValueError, "name: there is an adapter 'a' already; use bank.replace, or remove it first"):
        bank.add("a", these.path("b"))


def test_before_the_first_adapter(these: Tenants) -> None:
    model = these.base()
    bank = dvora.AdapterBank(model)
    with refused(ValueError, "does not know yet which layers it serves; add the folder of an adapter first"):
        bank.rows([None]).__enter__()
    assert bank.stats().slots_filled == 0
    outputs(model)


def test_outside_of_rows_the_model_raises(served: Served) -> None:
    x = inputs(served.model)["x"]
    with refused(ValueError, r"called outside of bank.rows\(...\), so nobody said which adapter each row has"):
        served.model(x)
    with served.bank.rows(["a"] * 4):
        served.model(x)
    with refused(ValueError, r"called outside of bank.rows"):
        served.model(x)


def test_a_batch_within_a_batch(served: Served) -> None:
    with served.bank.rows(["a"] * 4):
        with refused(ValueError, "this call is in a batch of the bank already"), served.bank.rows(["b"] * 4):
            raise AssertionError
        outputs(served.model)


def test_an_error_within_a_batch_ends_it(served: Served) -> None:
    with refused(ZeroDivisionError, "division"), served.bank.rows(["a"] * 4):
        raise ZeroDivisionError("division by zero")
    assert served.bank.stats().slots_in_use == 0


def test_a_base_that_was_written_to(these: Tenants) -> None:
    for change in (
        lambda model: model.lin1.weight.mul_(2),
        lambda model: model.half(),
        lambda model: model.load_state_dict(copy.deepcopy(model.state_dict())),
        lambda model: setattr(model.lin1, "weight", nn.Parameter(model.lin1.weight.clone())),
    ):
        with these.bank() as served:
            served(NAMES)
            with torch.no_grad():
                change(served.model)
            with refused(ValueError, r"lin\d: its weight was written to, cast or moved since the bank was made"):
                served(NAMES)


def test_pins_that_would_leave_no_slot(served: Served) -> None:
    bank = served.bank
    for names in (["a", "b"], ["a", "b", "c"]):
        with refused(ValueError, f"names: {len(names)} pinned adapters would leave none of the 2 slots for others"):
            bank.pin(names)
    assert bank.stats().pinned == 0
    bank.pin(["a"])
    with refused(ValueError, "2 pinned adapters would leave none"):
        bank.pin(["b"])
    with refused(ValueError, "a batch has 2 different adapters, and the bank 2 slots, 1 of them pinned for others"):
        served(["b", "c", None, None])
    bank.unpin(["a"])
    served(["b", "c", None, None])


def test_a_pinned_adapter_that_has_no_place_is_not_added(these: Tenants) -> None:
    model = these.base()
    with dvora.AdapterBank(model, slots=1) as bank:
        with refused(ValueError, "1 pinned adapters would leave none of the 1 slots"):
            bank.add("a", these.path("a"), pinned=True)
        assert list(bank) == []
        outputs(model)


def test_a_replacement_whose_pin_has_no_place_changes_nothing(these: Tenants) -> None:
    model = these.base()
    with dvora.AdapterBank(model, slots=3) as bank:
        for name in ("x", "y"):
            bank.add(name, these.path("a"), pinned=True)
        bank.add("z", these.path("b"), pinned=True)
        assert bank.stats().pinned == 2
        with refused(ValueError, "3 pinned adapters would leave none of the 3 slots"):
            bank.replace("y", these.path("c"))
        assert bank.digest("y") == bank.digest("x")
        bank.replace("z", these.path("c"))
        assert bank.stats().pinned == 2


def test_a_closed_bank(these: Tenants) -> None:
    model = these.base()
    bank = dvora.AdapterBank(model)
    bank.add("a", these.path("a"))
    with bank.rows(["a"] * 4):
        with refused(ValueError, "1 batches are in the bank, .* leave their `with` blocks before it is closed"):
            bank.close()
        outputs(model)
    bank.close()
    for call in (
        lambda: bank.rows(["a"]).__enter__(),
        lambda: bank.add("b", these.path("b")),
        lambda: bank.prefetch(["a"]),
        lambda: bank.replace("a", these.path("b")),
        lambda: bank.pin(["a"]),
        lambda: bank.digest("a"),
    ):
        with refused(ValueError, "the bank was closed; make a new one"):
            call()
    outputs(model)
    assert bank.stats().slots_in_use == 0
