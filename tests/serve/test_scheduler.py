"""What runs next, and how text comes out of tokens."""

from collections.abc import Sequence
from itertools import compress, product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dvora.serve.decoder import TextStream
from dvora.serve.requests import RefusedError, Request
from dvora.serve.scheduler import Limits, Scheduler

WORKS = ("classify", "embed", "generate")


def heard(*_: object) -> None:
    """Nobody listens."""


def request(work: Any, adapter: int, tokens: int) -> Request:
    return Request(work, f"a{adapter}" if adapter else None, range(tokens), heard)


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.sampled_from(WORKS), st.integers(0, 6), st.integers(1, 40)), min_size=4, max_size=40),
    st.integers(10, 100),
    st.integers(1, 6),
    st.integers(1, 4),
    st.data(),
)
def test_everything_runs_once_the_oldest_next_and_within_the_limits(
    asked: list[tuple[str, int, int]], tokens: int, rows: int, slots: int, data: st.DataObject
) -> None:
    limits = Limits(tokens, rows, 1000, slots, cache := data.draw(st.integers(60, 300)))
    scheduler = Scheduler(limits, data.draw(st.integers(0, 100)))
    requests = [request(*one) for one in asked]
    scheduler.add(requests)
    gone = [one for one in requests if data.draw(st.booleans())]
    for one in gone:
        one.is_cancelled = True
    order: list[Request] = []
    steps = 0
    while (batch := scheduler.schedule()) is not None:
        steps += 1
        assert steps < 1000, "somebody waits for ever"
        if batch.kind == "decode":
            assert list(batch.requests) == scheduler.running
            # A text ends now and then.
            scheduler.running = scheduler.running[data.draw(st.integers(0, 1)) :] if steps < 500 else []
            continue
        assert batch.requests[0] is next(one for one in requests if one not in {*order, *gone})
        assert list(batch.requests) == [one for one in requests if one in batch.requests]
        assert len({one.work for one in batch.requests}) == 1
        assert batch.kind == ("prefill" if batch.requests[0].work == "generate" else batch.requests[0].work)
        longest = max(len(one.tokens) for one in batch.requests)
        assert len(batch.requests) == 1 or longest * len(batch.requests) <= tokens
        if batch.kind == "prefill":
            scheduler.running += batch.requests
            assert len(scheduler.running) <= rows
            assert len(scheduler.running) * max(one.room for one in scheduler.running) <= cache
        assert len(batch.requests) <= rows
        assert len({one.adapter for one in (*batch.requests, *scheduler.running)} - {None}) <= slots
        order += batch.requests
    assert {*order} == {*requests} - {*gone}
    assert len(order) == len({*order})


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
    scheduler = Scheduler(limits := Limits(tokens, rows), pass_tokens)
    scheduler.add([request("classify", 0, length) for length in lengths])
    cost = 0
    while (batch := scheduler.schedule()) is not None:
        cost += max(len(one.tokens) for one in batch.requests) * len(batch.requests) + pass_tokens
    assert cost == cheapest(lengths, limits, pass_tokens)


def test_a_text_gets_its_step_between_prompts() -> None:
    scheduler = Scheduler(Limits(batch_rows=2))
    scheduler.add([request("generate", 1, 3)])
    scheduler.running = list(scheduler.schedule().requests)  # type: ignore[union-attr]
    scheduler.add([request("generate", 2, 3)])
    assert [batch.kind for _ in range(2) if (batch := scheduler.schedule())] == ["decode", "prefill"]


def test_a_full_queue_takes_nothing() -> None:
    scheduler = Scheduler(Limits(queue=3))
    scheduler.add([request("embed", 0, 1)] * 2)
    with pytest.raises(RefusedError, match="at most 3"):
        scheduler.add([request("embed", 0, 1)] * 2)
    assert len(scheduler.waiting) == 2


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
