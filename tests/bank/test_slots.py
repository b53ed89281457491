"""Batches that wait for slots go in turn, and rows in memory keep within their bytes. LRU: `test_bank_machine.py`."""

from collections import OrderedDict
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dvora.bank.slots import AdapterRow, HostRows, Slots
from dvora.rows.gathered import Held, LayerPlace
from tests.bank.versions import in_threads, until


def rows(digests: Sequence[str]) -> dict[str, AdapterRow]:
    """That say which adapter it is; those of capital letters are larger."""
    return {
        digest: AdapterRow(torch.full((5 if digest.isupper() else 3,), ord(digest)), Held({})) for digest in digests
    }


def slots(count: int) -> Slots:
    return Slots(count, AdapterRow(torch.zeros(3), Held({})), [LayerPlace(0, 1, 1)], torch.device("cpu"))


def test_a_batch_takes_all_its_slots_or_none_while_it_waits() -> None:
    held, first, second = slots(3), object(), object()
    held.take(first, "ab", rows)

    def watches() -> None:
        until(lambda: held.waiting() == 1)
        assert held.in_use() == 2
        assert "c" not in held
        # The base needs no slot, and no turn.
        held.take(object(), "", rows)
        held.release(first)

    place, _ = in_threads(lambda: held.take(second, "cd", rows), watches)
    assert {digest: float(held.factors[slot, 0]) for digest, slot in place.items()} == {"c": ord("c"), "d": ord("d")}


def test_batches_that_wait_are_served_in_turn_so_that_small_ones_keep_no_large_one_out() -> None:
    held, first, order = slots(2), object(), list[str]()
    held.take(first, "a", rows)

    def take(name: str, digests: str, turn: int) -> None:
        until(lambda: held.waiting() == turn)
        held.take(batch := object(), digests, rows)
        order.append(name)
        held.release(batch)

    def watch() -> None:
        until(lambda: held.waiting() == 2)
        held.release(first)

    # What the small one needs is in its slot all the time.
    in_threads(lambda: take("large", "cd", 0), lambda: take("small", "a", 1), watch)
    assert order == ["large", "small"]
    assert held.in_use() == 0


def test_rows_that_do_not_fit_lose_no_slot() -> None:
    held = slots(1)
    for _ in range(3):
        with pytest.raises(RuntimeError):
            held.take(object(), "B", rows)
    assert (held.used(), held.in_use()) == (0, 0)
    held.take(object(), "a", rows)


@given(st.lists(st.tuples(st.sampled_from("abcdE"), st.sampled_from(["put", "get", "remove"])), max_size=40))
def test_on_the_host_are_the_last_used_within_a_number_of_bytes(steps: list[tuple[str, str]]) -> None:
    limit = 100
    held, kept = HostRows(limit), OrderedDict[str, int]()
    for digest, step in steps:
        row = rows([digest])[digest]
        if step == "put":
            held.put(digest, row)
            kept.pop(digest, None)
            while kept and sum(kept.values()) + row.nbytes > limit:
                kept.popitem(last=False)
            kept[digest] = row.nbytes
        elif step == "get":
            assert (held.get(digest) is not None) == (digest in kept)
            if digest in kept:
                kept.move_to_end(digest)
        else:
            held.remove(digest)
            kept.pop(digest, None)
        assert (len(held), held.nbytes) == (len(kept), sum(kept.values()))
