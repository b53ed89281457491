"""What runs next."""

import time
from collections.abc import Sequence
from itertools import compress, product
from math import inf
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dvora.serve.requests import RefusedError, Request
from dvora.serve.scheduler import Batch, Scheduler
from dvora.serve.settings import Limits


def heard(*_: object) -> None:
    """Nobody listens."""


def request(work: Any, adapter: int, tokens: int, **others: Any) -> Request:
    return Request(work, f"a{adapter}" if adapter else None, range(tokens), heard, **others)


def batch_of(scheduler: Scheduler) -> Batch:
    """The next one, which there is."""
    batch = scheduler.schedule()
    assert batch is not None
    return batch


ROWS = st.lists(
    st.tuples(st.sampled_from(["classify", "embed"]), st.integers(0, 6), st.integers(1, 40), st.sampled_from("pqr")),
    min_size=4,
    max_size=30,
)


@settings(max_examples=100)
@given(ROWS, st.integers(10, 100), st.integers(1, 6), st.integers(1, 4), st.data())
def test_everything_runs_once_the_oldest_of_a_queue_next_and_within_the_limits(
    asked: list[tuple[str, int, int, str]], tokens: int, rows: int, slots: int, data: st.DataObject
) -> None:
    limits = Limits(batch_tokens=tokens, batch_rows=rows, queue=1000, slots=slots)
    scheduler = Scheduler(limits, data.draw(st.integers(0, 100)))
    requests = [request(*one[:3], queue=one[3], arrived=float(number)) for number, one in enumerate(asked)]
    scheduler.add(requests)
    gone = [one for one in requests if data.draw(st.booleans())]
    for one in gone:
        one.is_cancelled, one.deadline = data.draw(st.sampled_from([(True, inf), (False, 0.0)]))
    scheduler.remove(gone[: len(gone) // 2])
    waiting, order = [one for one in requests if one not in gone], list[Request]()
    while (batch := scheduler.schedule()) is not None:
        first = batch.requests[0]
        assert first is next(one for one in waiting if one.queue == first.queue)
        assert {one.work for one in batch.requests} == {first.work} == {batch.kind}
        assert len(batch.requests) == 1 or max(one.length for one in batch.requests) * len(batch.requests) <= tokens
        assert len(batch.requests) <= rows
        assert len({one.version for one in batch.requests} - {None}) <= slots
        waiting = [one for one in waiting if one not in batch.requests]
        order += batch.requests
        assert scheduler.waiting == len([*scheduler.all_waiting()]) >= len(waiting)
    assert sorted(order, key=id) == sorted((one for one in requests if one not in gone), key=id)
    assert scheduler.waiting == 0


@settings(max_examples=25)
@given(data=st.data(), rows=st.integers(2, 8), pass_tokens=st.integers(0, 200))
def test_one_flood_lets_single_requests_of_others_wait_for_three_batches_at_most(
    data: st.DataObject, rows: int, pass_tokens: int
) -> None:
    scheduler = Scheduler(Limits(batch_tokens=200, batch_rows=rows, queue=200, slots=16), pass_tokens)
    lengths = st.integers(1, 100)

    def flood() -> None:
        while scheduler.waiting < 150:
            scheduler.add([request("classify", 1, data.draw(lengths), queue="flood")])

    flood()
    for _ in range(data.draw(st.integers(1, 30))):
        batch_of(scheduler)
    for _ in range(5):
        single = request("classify", 2, data.draw(lengths), queue="single")
        scheduler.add([single])
        waited = 0
        while single in scheduler.all_waiting():
            flood()
            batch_of(scheduler)
            waited += 1
        assert waited <= 4, "three others, and its own"
        while data.draw(st.booleans()):
            flood()
            batch_of(scheduler)


def test_floods_share_by_what_they_cost() -> None:
    scheduler = Scheduler(Limits(queue=10_000), 64)
    costs = {"long": 0, "short": 0}
    for _ in range(2000):
        scheduler.add([request("classify", 0, 400, queue="long"), request("classify", 0, 8, queue="short")])
    for _ in range(60):
        batch = batch_of(scheduler)
        costs[batch.requests[0].queue] += max(one.length for one in batch.requests) * len(batch.requests) + 64
    assert 0.6 < costs["long"] / costs["short"] < 1.7


def test_a_full_queue_is_its_longest_queues() -> None:
    scheduler = Scheduler(Limits(queue=6))
    flood = [request("embed", 0, 1, queue="flood") for _ in range(6)]
    assert scheduler.add(flood) == []
    with pytest.raises(RefusedError, match="6 requests of this key or adapter wait"):
        scheduler.add([request("embed", 0, 1, queue="flood")])
    others = [request("embed", 0, 1, queue="other") for _ in range(4)]
    # The youngest of the flood go, until both wait for as much.
    assert scheduler.add(others[:1]) == flood[5:]
    assert scheduler.add(others[1:3]) == flood[:2:-1][1:3]
    with pytest.raises(RefusedError, match="3 requests of this key or adapter wait"):
        scheduler.add(others[3:])
    with pytest.raises(RefusedError, match="0 requests of this key or adapter wait"):
        scheduler.add([request("embed", 0, 1, queue="third") for _ in range(5)])
    assert [*scheduler.all_waiting()] == [*flood[:3], *others[:3]]


def test_a_batch_costs_no_more_to_make_where_many_wait() -> None:
    seconds = []
    for count in (200, 20_000):
        scheduler = Scheduler(Limits(queue=10**6))
        scheduler.add([request("classify", 0, 5 + number % 7, queue=f"q{number % 5}") for number in range(count)])
        started = time.process_time()
        for _ in range(5):
            scheduler.schedule()
        seconds.append(time.process_time() - started)
    assert seconds[1] < 10 * seconds[0]


def cheapest(lengths: Sequence[int], limits: Limits, pass_tokens: int) -> int:
    """What texts cost at least: the first one with any of the others, and the rest."""
    if not lengths:
        return 0
    costs = []
    for beside in product((False, True), repeat=len(lengths) - 1):
        batch = [lengths[0], *compress(lengths[1:], beside)]
        rest = [length for length, is_in in zip(lengths[1:], beside, strict=True) if not is_in]
        padded = max(batch) * len(batch)
        if len(batch) <= limits.batch_rows and (len(batch) == 1 or padded <= limits.batch_tokens):
            costs.append(padded + pass_tokens + cheapest(rest, limits, pass_tokens))
    return min(costs)


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(10, 150), st.integers(3, 6), st.integers(0, 60)
)
def test_what_runs_together_costs_least(lengths: list[int], tokens: int, rows: int, pass_tokens: int) -> None:
    scheduler = Scheduler(limits := Limits(batch_tokens=tokens, batch_rows=rows), pass_tokens)
    scheduler.add([request("classify", 0, length) for length in lengths])
    cost = 0
    while (batch := scheduler.schedule()) is not None:
        cost += max(one.length for one in batch.requests) * len(batch.requests) + pass_tokens
    assert cost == cheapest(lengths, limits, pass_tokens)
