"""Which adapter leaves its slot for another: the least recently used, never one in use or pinned; batches in turn."""

import threading
from collections import OrderedDict
from collections.abc import Collection

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dvora.bank.factor_rows import Factors
from dvora.bank.slots import Slots
from tests.bank.versions import in_threads, until
from tests.interrupted import interrupted_at

BASE = Factors(torch.full((3,), -1.0), torch.full((2,), -2.0))


def factors(digest: str) -> Factors:
    """Rows that name their adapter."""
    return Factors(torch.full((3,), float(ord(digest))), torch.full((2,), float(ord(digest)) + 0.5))


def slots(count: int) -> Slots:
    return Slots(count, BASE, torch.device("cpu"))


def check_values(held: Slots, place: dict[str, int]) -> None:
    for digest, slot in place.items():
        assert torch.equal(held.values[slot], factors(digest).row)
        assert torch.equal(held.heads[slot], factors(digest).heads)
    assert torch.equal(held.values[-1], BASE.row)
    assert torch.equal(held.heads[-1], BASE.heads)


def served(held: Slots, digests: Collection[str]) -> dict[str, int]:
    batch = object()
    try:
        place = held.take(batch, digests, factors)
        check_values(held, place)
        assert len(set(place.values())) == len(place) == len(digests)
        return place
    finally:
        held.leave(batch)


def test_the_least_recently_used_leaves_first() -> None:
    held = slots(2)
    served(held, "a"), served(held, "b"), served(held, "a"), served(held, "c")
    assert [digest in held for digest in "abc"] == [True, False, True]
    assert (held.hits, held.loads, held.evictions) == (1, 3, 1)
    assert held.used() == 2


def test_what_is_in_use_stays() -> None:
    held = slots(2)
    first = object()
    place = held.take(first, "a", factors)
    for digest in "bcd":
        served(held, digest)
        assert "a" in held
        check_values(held, place)
    held.leave(first)
    assert held.in_use() == 0


def test_what_is_pinned_stays_also_if_it_was_not_there_yet() -> None:
    held = slots(2)
    served(held, "a")
    held.pin("a")
    for digest in "bcd":
        served(held, digest)
        assert "a" in held
    held.unpin("a")
    served(held, "e"), served(held, "f")
    assert "a" not in held
    held.pin("g")
    assert "g" not in held
    served(held, "g"), served(held, "h"), served(held, "i")
    assert "g" in held
    assert held.pinned() == 1


def test_more_than_there_are_is_refused_and_takes_nothing() -> None:
    held = slots(2)
    served(held, "ab")
    for digests, pinned, message in (
        ("abc", "", "3 different adapters, and the bank 2 slots, 0"),
        ("ab", "c", "1 of them"),
    ):
        held.pin(pinned)
        with pytest.raises(ValueError, match=message):
            held.take(batch := object(), digests, factors)
        held.leave(batch)
        held.unpin(pinned)
    assert held.in_use() == 0
    assert [digest in held for digest in "abc"] == [True, True, False]


@given(
    count=st.integers(1, 4),
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("take"), st.sets(st.sampled_from("abcdef"), max_size=4)),
            st.tuples(st.just("leave"), st.integers(0, 5)),
            st.tuples(st.just("pin"), st.sampled_from("abcdef")),
            st.tuples(st.just("unpin"), st.sampled_from("abcdef")),
            st.tuples(st.just("load"), st.sampled_from("abcdef")),
        ),
        max_size=40,
    ),
)
def test_any_history_is_that_of_a_plain_list(count: int, steps: list[tuple[str, object]]) -> None:
    held, known = slots(count), OrderedDict[str, None]()
    pinned, batches, evictions = set[str](), list[tuple[object, set[str]]](), 0

    def fits(digests: set[str]) -> bool:
        kept = pinned.union(digests, *(own for _, own in batches))
        free = count - len(known) + sum(digest not in kept for digest in known)
        return len(digests - known.keys()) <= free

    def load(digests: list[str]) -> None:
        nonlocal evictions
        kept = pinned.union(digests, *(own for _, own in batches))
        for digest in digests:
            if digest in known:
                continue
            if len(known) == count:
                del known[next(each for each in known if each not in kept)]
                evictions += 1
            known[digest] = None

    for step, what in steps:
        if step == "take" and len(what | pinned) <= count and fits(what):
            digests = sorted(what)
            place = held.take(batch := object(), digests, factors)
            check_values(held, place)
            load(digests)
            for digest in digests:
                known.move_to_end(digest)
            batches.append((batch, what))
        elif step == "leave" and batches:
            held.leave(batches.pop(what % len(batches))[0])
        elif step == "pin" and len(pinned | {what}) < count:
            pinned.add(what)
            held.pin(what)
        elif step == "unpin":
            pinned.discard(what)
            held.unpin(what)
        elif step == "load" and len(pinned | {what}) <= count:
            is_there = what in known or fits({what})
            if is_there:
                load([what])
            assert held.load_if_free(what, factors(what)) == is_there
        assert [digest in held for digest in "abcdef"] == [digest in known for digest in "abcdef"]
        assert held.evictions == evictions
        assert held.used() == len(known)
        assert held.in_use() == len(set().union(*(own for _, own in batches)))


def test_a_batch_takes_all_its_slots_or_none_while_it_waits() -> None:
    held = slots(3)
    first, second, third = object(), object(), object()
    held.take(first, "ab", factors)
    taken = threading.Event()

    def waits() -> dict[str, int]:
        place = held.take(second, "cd", factors)
        taken.set()
        return place

    def watches() -> None:
        until(lambda: len(held._waiting) == 1)
        assert held.in_use() == 2
        assert "c" not in held
        # The base needs no slot, and no turn.
        held.take(third, "", factors)
        held.leave(third)
        held.leave(first)

    found = in_threads(waits, watches)
    assert taken.is_set()
    check_values(held, found[0])


def test_batches_that_wait_are_served_in_turn_so_that_small_ones_keep_no_large_one_out() -> None:
    held, first, order = slots(2), object(), list[str]()
    held.take(first, "a", factors)

    def take(name: str, digests: str, turn: int) -> None:
        until(lambda: len(held._waiting) == turn)
        batch = object()
        held.take(batch, digests, factors)
        order.append(name)
        held.leave(batch)

    def watch() -> None:
        until(lambda: len(held._waiting) == 2)
        held.leave(first)

    # What the small one needs is in its slot all the time.
    in_threads(lambda: take("large", "cd", 0), lambda: take("small", "a", 1), watch)
    assert order == ["large", "small"]
    assert held.in_use() == 0


def test_a_batch_whose_rows_cannot_be_read_takes_nothing_and_loses_nothing() -> None:
    held = slots(2)
    served(held, "a")

    def load(digest: str) -> Factors:
        if digest == "c":
            raise ValueError("damaged")
        return factors(digest)

    with pytest.raises(ValueError, match="damaged"):
        held.take(batch := object(), "bc", load)
    held.leave(batch)
    assert held.in_use() == 0
    served(held, "bd")
    assert held.used() == 2


def test_rows_that_do_not_fit_lose_no_slot() -> None:
    held = slots(1)
    served(held, "a")
    for _ in range(3):
        with pytest.raises(RuntimeError):
            held.take(batch := object(), "b", lambda _: Factors(torch.zeros(7), torch.zeros(2)))
        held.leave(batch)
    assert held.used() == 0
    served(held, "a"), served(held, "b")


def test_evicted_while_a_batch_waits_rows_are_loaded_again() -> None:
    held, loaded = slots(2), list[str]()
    served(held, "a")
    first, second, third = object(), object(), object()
    held.take(first, "bc", factors)

    def load(digest: str) -> Factors:
        loaded.append(digest)
        return factors(digest)

    def waits() -> None:
        check_values(held, held.take(second, "bd", load))

    def watches() -> None:
        until(lambda: len(held._waiting) == 1)
        assert loaded == ["d"]
        held.leave(first)

    in_threads(waits, watches)
    held.leave(second)
    held.leave(third)
    assert loaded == ["d"]
    assert held.in_use() == 0


def test_closed_slots_take_no_batch() -> None:
    held = slots(1)
    held.take(batch := object(), "", factors)
    with pytest.raises(ValueError, match="1 batches are in the bank"):
        held.close()
    held.leave(batch)
    held.close()
    with pytest.raises(ValueError, match="the bank was closed"):
        held.take(object(), "a", factors)
    assert not held.load_if_free("a", factors("a"))


def test_slots_made_in_inference_mode_can_be_written_later() -> None:
    with torch.inference_mode():
        held = slots(1)
        served(held, "a")
    served(held, "b")
    assert not held.values.is_inference()


def test_rows_without_heads_and_bytes() -> None:
    held = Slots(2, Factors(torch.zeros(3, dtype=torch.float16), torch.empty(0)), torch.device("cpu"))
    assert held.heads.shape == (3, 0)
    held.take(batch := object(), "a", lambda _: Factors(torch.ones(3, dtype=torch.float16), torch.empty(0)))
    held.leave(batch)
    assert held.nbytes == 3 * 3 * 2


def test_an_interruption_loses_no_slot_and_serves_nothing_wrong() -> None:
    for moment in range(400):
        held = slots(2)
        served(held, "a"), served(held, "b")

        def run(held: Slots = held) -> None:
            batch = object()
            try:
                held.take(batch, "bc", factors)
            finally:
                held.leave(batch)

        was_interrupted = interrupted_at(moment, run, passing_over="with ")
        if held._batches or held._waiting:
            # Interrupted as it left: the bank's `surely` calls it again.
            for batch in [*held._batches, *held._waiting]:
                held.leave(batch)
        served(held, "ad"), served(held, "bc")
        assert (held.used(), held.in_use()) == (2, 0)
        if not was_interrupted:
            break
    else:
        raise AssertionError("more lines than expected")
