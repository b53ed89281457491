"""Where rows are: the least recently used leave first, never those in use; batches go in turn."""

import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dvora.bank.factor_rows import AdapterRow, LayerPlace
from dvora.bank.slots import HostRows, Slots
from tests.bank.versions import in_threads, until

PLACES = [LayerPlace(0, 1, 1)]


def row_of(value: float, outputs: int = 2) -> AdapterRow:
    return AdapterRow(torch.full((3,), value), {"head": torch.full((outputs,), value + 0.5)})


def rows(digests: Sequence[str]) -> dict[str, AdapterRow]:
    """That name their adapter; those of capital letters have larger heads."""
    return {digest: row_of(ord(digest), 4 if digest.isupper() else 2) for digest in digests}


BASE = row_of(-1.0)


def slots(count: int) -> Slots:
    return Slots(count, BASE, PLACES, torch.device("cpu"))


def check_values(held: Slots, place: dict[str, int]) -> None:
    for slot, row in [(held.count, BASE), *((slot, rows([digest])[digest]) for digest, slot in place.items())]:
        assert torch.equal(held.factors[slot], row.factors)
        (outputs,) = held.shapes[slot]["head"]
        assert torch.equal(held.heads["head"][slot][:outputs], row.heads["head"])


def served(held: Slots, digests: Collection[str]) -> dict[str, int]:
    batch = object()
    try:
        place = held.take(batch, digests, rows)
        check_values(held, place)
        assert len(set(place.values())) == len(place) == len(digests)
        return place
    finally:
        held.leave(batch)


class Listed:
    """What slots are to do, written as plainly as can be.

    Args:
        count: of the slots.
    """

    def __init__(self, count: int) -> None:
        self.count, self.known = count, OrderedDict[str, None]()
        self.batches: list[tuple[object, set[str]]] = []
        self.evictions = 0

    def kept(self) -> set[str]:
        return set().union(*(digests for _, digests in self.batches))

    def fits(self, digests: set[str]) -> bool:
        return len(self.kept() | digests) <= self.count

    def load(self, digests: set[str]) -> None:
        for digest in sorted(digests - self.known.keys()):
            if len(self.known) == self.count:
                del self.known[next(other for other in self.known if other not in self.kept() | digests)]
                self.evictions += 1
            self.known[digest] = None


letters_ = st.sampled_from("abcDEF")
steps_ = st.one_of(
    st.tuples(st.sampled_from(["take", "use", "use"]), st.sets(letters_, max_size=3)),
    st.tuples(st.just("leave"), st.integers(0, 5)),
)


@settings(max_examples=100)
@given(count=st.integers(1, 4), steps=st.lists(steps_, min_size=10, max_size=40))
def test_the_least_recently_used_leave_and_nothing_else_in_any_history(
    count: int, steps: list[tuple[str, Any]]
) -> None:
    held, listed = slots(count), Listed(count)
    for step, what in steps:
        if step in ("take", "use") and listed.fits(what):
            batch = object()
            check_values(held, held.take(batch, sorted(what), rows))
            listed.batches.append((batch, what))
            listed.load(what)
            for digest in sorted(what):
                listed.known.move_to_end(digest)
            if step == "use":
                held.leave(listed.batches.pop()[0])
        elif step == "leave" and listed.batches:
            held.leave(listed.batches.pop(what % len(listed.batches))[0])
        assert {digest for digest in "abcDEF" if digest in held} == listed.known.keys()
        assert (held.evictions, held.used()) == (listed.evictions, len(listed.known))
        assert held.in_use() == len(listed.kept())


def test_a_batch_takes_all_its_slots_or_none_while_it_waits() -> None:
    held, first, second = slots(3), object(), object()
    held.take(first, "ab", rows)

    def watches() -> None:
        until(lambda: len(held._waiting) == 1)
        assert held.in_use() == 2
        assert "c" not in held
        # The base needs no slot, and no turn.
        served(held, "")
        held.leave(first)

    place, _ = in_threads(lambda: held.take(second, "cd", rows), watches)
    check_values(held, place)


def test_batches_that_wait_are_served_in_turn_so_that_small_ones_keep_no_large_one_out() -> None:
    held, first, order = slots(2), object(), list[str]()
    held.take(first, "a", rows)

    def take(name: str, digests: str, turn: int) -> None:
        until(lambda: len(held._waiting) == turn)
        held.take(batch := object(), digests, rows)
        order.append(name)
        held.leave(batch)

    def watch() -> None:
        until(lambda: len(held._waiting) == 2)
        held.leave(first)

    # What the small one needs is in its slot all the time.
    in_threads(lambda: take("large", "cd", 0), lambda: take("small", "a", 1), watch)
    assert order == ["large", "small"]
    assert held.in_use() == 0


def test_rows_that_do_not_fit_lose_no_slot() -> None:
    held = slots(1)
    served(held, "a")
    for _ in range(3):
        with pytest.raises(RuntimeError):
            held.take(object(), "b", lambda _: {"b": BASE._replace(factors=torch.zeros(7))})
    assert (held.used(), held.in_use()) == (0, 0)
    served(held, "a"), served(held, "b")


def test_rows_that_were_evicted_while_a_batch_waits_are_loaded_then() -> None:
    held, loaded, holds = slots(2), list[str](), threading.Event()
    served(held, "a")

    def load(digests: Sequence[str]) -> dict[str, AdapterRow]:
        loaded.extend(digests)
        return rows(digests)

    def waits() -> dict[str, int]:
        holds.wait()
        return held.take(object(), "ac", load)

    def watches() -> None:
        held.take(first := object(), "b", rows)
        holds.set()
        until(lambda: len(held._waiting) == 1)
        assert loaded == ["c"]
        # A second batch of a thread that holds slots, as another asyncio task may begin one, waits for none.
        held.take(second := object(), "d", rows)
        assert "a" not in held
        held.leave(first)
        held.leave(second)

    place, _ = in_threads(waits, watches)
    check_values(held, place)
    assert sorted(loaded) == ["a", "c"]


@given(st.lists(st.tuples(st.sampled_from("abcdE"), st.sampled_from(["put", "get", "remove"])), max_size=40))
def test_on_the_host_are_the_last_used_within_a_number_of_bytes(steps: list[tuple[str, str]]) -> None:
    # A row has 20 bytes, one with a larger head 28.
    held, kept = HostRows(60), OrderedDict[str, int]()
    for digest, step in steps:
        row = rows([digest])[digest]
        if step == "put":
            held.put(digest, row)
            kept.pop(digest, None)
            while kept and sum(kept.values()) + row.nbytes > 60:
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
