"""What runs next, and how text comes out of tokens."""

import time
from collections.abc import Sequence
from itertools import compress, product
from math import inf
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dvora.serve.decoder import TextStream
from dvora.serve.requests import RefusedError, Request, Sampling
from dvora.serve.scheduler import Batch, Scheduler
from dvora.serve.settings import Limits

WORKS = st.sampled_from([("classify", "embed"), ("generate",)])
"""Of an encoder, and of a language model."""


def heard(*_: object) -> None:
    """Nobody listens."""


def request(work: Any, adapter: int, tokens: int, most: int = 16, **others: Any) -> Request:
    return Request(work, f"a{adapter}" if adapter else None, range(tokens), heard, Sampling(max_tokens=most), **others)


def run(scheduler: Scheduler, batch: Batch) -> None:
    """What the engine does: texts get a token each, and end when they have as many as they may."""
    for text in batch.paused:
        scheduler.running.remove(text)
    if batch.kind == "prefill":
        scheduler.running += batch.requests
    if batch.kind in ("prefill", "decode"):
        for text in batch.requests:
            text.generated.append(0)
    scheduler.running = [text for text in scheduler.running if len(text.generated) < text.sampling.max_tokens]


ROWS = WORKS.flatmap(
    lambda works: st.lists(
        st.tuples(
            st.sampled_from(works), st.integers(0, 6), st.integers(1, 40), st.integers(1, 150), st.sampled_from("pqr")
        ),
        min_size=4,
        max_size=30,
    )
)


@settings(max_examples=100)
@given(
    ROWS,
    st.integers(10, 100),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(190, 400),
    st.data(),
)
def test_everything_runs_once_the_oldest_of_a_queue_next_and_within_the_limits(
    asked: list[tuple[str, int, int, int, str]],
    tokens: int,
    rows: int,
    slots: int,
    cache: int,
    data: st.DataObject,
) -> None:
    scheduler = Scheduler(
        Limits(batch_tokens=tokens, batch_rows=rows, queue=1000, slots=slots, cache_tokens=cache),
        data.draw(st.integers(0, 100)),
    )
    requests = [request(*one[:4], queue=one[4], arrived=float(number)) for number, one in enumerate(asked)]
    scheduler.add(requests)
    gone = [one for one in requests if data.draw(st.booleans())]
    for one in gone:
        one.is_cancelled, one.deadline = data.draw(st.sampled_from([(True, inf), (False, 0.0)]))
    scheduler.remove(gone[: len(gone) // 2])
    waiting, order = [one for one in requests if one not in gone], list[Request]()
    for _ in range(20_000):
        if (batch := scheduler.schedule()) is None:
            break
        waiting += batch.paused
        if batch.kind == "decode":
            assert {*batch.requests} == {*scheduler.running} - {*batch.paused}
        else:
            first = batch.requests[0]
            # Texts that have lost their rows go before those that never had one.
            of_queue = [one for one in waiting if one.queue == first.queue]
            assert first is min(of_queue, key=lambda one: (not one.generated, one.arrived))
            assert {one.work for one in batch.requests} == {first.work}
            assert batch.kind == ("prefill" if first.work == "generate" else first.work)
            assert len(batch.requests) == 1 or max(one.length for one in batch.requests) * len(batch.requests) <= tokens
            waiting = [one for one in waiting if one not in batch.requests]
            order += [one for one in batch.requests if not one.generated]
        run(scheduler, batch)
        running = {*batch.requests, *scheduler.running}
        assert len(running) <= rows
        assert len({one.version for one in running} - {None}) <= slots
        held = [one for one in running if one.work == "generate"]
        assert len(held) <= 1 or len(held) * max(one.length - 1 for one in held) <= cache
        assert scheduler.waiting == len([*scheduler.all_waiting()]) >= len(waiting)
    else:
        pytest.fail("somebody waits for ever")
    assert sorted(order, key=id) == sorted((one for one in requests if one not in gone), key=id)
    assert all(len(one.generated) == one.sampling.max_tokens for one in order if one.work == "generate")
    assert scheduler.waiting == 0


@pytest.mark.parametrize("work", ["classify", "generate"])
@settings(max_examples=25)
@given(data=st.data(), rows=st.integers(2, 8), cache=st.integers(600, 4000), pass_tokens=st.integers(0, 200))
def test_one_flood_lets_single_requests_of_others_wait_for_three_batches_at_most(
    work: str, data: st.DataObject, rows: int, cache: int, pass_tokens: int
) -> None:
    scheduler = Scheduler(
        Limits(batch_tokens=200, batch_rows=rows, queue=200, slots=16, cache_tokens=cache), pass_tokens
    )
    lengths, most = st.integers(1, 100), st.integers(1, 300)

    def flood() -> None:
        while scheduler.waiting < 150:
            scheduler.add([request(work, 1, data.draw(lengths), data.draw(most), queue="flood")])

    flood()
    for _ in range(data.draw(st.integers(1, 30))):
        run(scheduler, scheduler.schedule())  # type: ignore[arg-type]
    for _ in range(5):
        single = request(work, 2, data.draw(lengths), data.draw(st.integers(1, 30)), queue="single")
        scheduler.add([single])
        waited = 0
        while single in scheduler.all_waiting():
            flood()
            run(scheduler, scheduler.schedule())  # type: ignore[arg-type]
            waited += 1
        assert waited <= 4, "three others, and its own"
        while single in scheduler.running or data.draw(st.booleans()):
            flood()
            run(scheduler, scheduler.schedule())  # type: ignore[arg-type]


def test_floods_share_by_what_they_cost() -> None:
    scheduler = Scheduler(Limits(queue=10_000), 64)
    costs = {"long": 0, "short": 0}
    for _ in range(2000):
        scheduler.add([request("classify", 0, 400, queue="long"), request("classify", 0, 8, queue="short")])
    for _ in range(60):
        batch = scheduler.schedule()
        assert batch is not None
        costs[batch.requests[0].queue] += max(one.length for one in batch.requests) * len(batch.requests) + 64
    assert 0.6 < costs["long"] / costs["short"] < 1.7


def test_long_texts_of_one_queue_make_room_for_another_and_no_queue_pushes_out_its_equal() -> None:
    scheduler = Scheduler(Limits(batch_rows=8))
    scheduler.add([request("generate", 0, 10, 1000, queue="many") for _ in range(12)])
    run(scheduler, scheduler.schedule())  # type: ignore[arg-type]
    oldest = list(scheduler.running)
    scheduler.add([request("generate", 0, 10, 1000, queue="other") for _ in range(12)])
    passes = paused = 0
    for _ in range(200):
        batch = scheduler.schedule()
        assert batch is not None
        passes, paused = passes + (batch.kind == "prefill"), paused + len(batch.paused)
        run(scheduler, batch)
    assert sorted(text.queue for text in scheduler.running) == ["many"] * 4 + ["other"] * 4
    assert paused <= 4
    assert passes <= 5
    assert {*oldest[:4]} <= {*scheduler.running}


def test_texts_take_room_as_they_grow() -> None:
    scheduler = Scheduler(Limits(cache_tokens=1000))
    texts = [request("generate", 0, 10, 900, arrived=float(number)) for number in range(10)]
    scheduler.add(texts)
    batch = scheduler.schedule()
    assert batch is not None
    assert len(batch.requests) == 10
    passes = 0
    while batch is not None:
        # The oldest goes on, whoever has to wait.
        assert texts[0] not in batch.paused
        passes += batch.kind == "prefill"
        run(scheduler, batch)
        batch = scheduler.schedule()
    assert passes < 40
    assert all(len(text.generated) == 900 for text in texts)


def test_texts_of_a_queue_that_was_forgotten_make_room() -> None:
    """Of many queues those in which nobody waits are forgotten; their texts run on."""
    scheduler = Scheduler(Limits(queue=2, batch_rows=2))
    scheduler.add(texts := [request("generate", 0, 10, 1000, queue="first", arrived=float(n)) for n in range(2)])
    run(scheduler, scheduler.schedule())  # type: ignore[arg-type]
    for number in range(6):
        scheduler.add([other := request("generate", 0, 10, 1000, queue=f"other {number}")])
        scheduler.remove([other])
    scheduler.add([other])
    assert scheduler.schedule() == Batch("decode", texts, [])
    assert scheduler.schedule() == Batch("prefill", [other], texts[1:])


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


def test_a_text_gets_its_step_between_prompts() -> None:
    scheduler = Scheduler(Limits(batch_rows=2))
    scheduler.add([request("generate", 1, 3)])
    scheduler.running = list(scheduler.schedule().requests)  # type: ignore[union-attr]
    scheduler.add([request("generate", 2, 3)])
    assert [batch.kind for _ in range(2) if (batch := scheduler.schedule())] == ["decode", "prefill"]


class Bytes:
    """A tokenizer whose tokens are bytes, of which some letters take several."""

    def decode(self, tokens: list[int], **_: object) -> str:
        return bytes(tokens).decode(errors="replace")


@given(st.text("aé漢", max_size=30), st.lists(st.text("aé漢", min_size=1, max_size=4), max_size=3))
def test_pieces_are_the_text_up_to_its_stop(text: str, stops: list[str]) -> None:
    stream, pieces = TextStream(Bytes(), stops), []
    for token in text.encode():
        pieces.append(stream.add(token))
        if stream.is_stopped:
            break
    else:
        pieces.append(stream.rest())
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces) or "\N{REPLACEMENT CHARACTER}" in text
    # The stop that is complete first; of two that are complete with one letter the longer one.
    ends = [(place + len(stop), place) for stop in stops if (place := text.find(stop)) >= 0]
    assert "".join(pieces) == text[: min(ends, default=(0, len(text)))[1]]
    assert stream.is_stopped == bool(ends)


def test_tokens_without_text_are_decoded_once() -> None:
    """An adapter can repeat a special token, or half of a letter, as long as it likes."""
    sizes = list[int]()

    class Silent(Bytes):
        def decode(self, tokens: list[int], **options: object) -> str:
            sizes.append(len(tokens))
            return super().decode([token for token in tokens if token], **options)

    for token in (0, "漢".encode()[0]):
        stream = TextStream(Silent(), [])
        for _ in range(200):
            stream.add(token)
        assert stream.add(ord("a")).endswith("a") or stream.rest().endswith("a")
    assert max(sizes) < 40
