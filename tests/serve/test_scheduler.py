"""What runs next, and how text comes out of tokens."""

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
def test_everything_runs_once_in_order_and_within_the_limits(
    asked: list[tuple[str, int, int]], tokens: int, rows: int, slots: int, data: st.DataObject
) -> None:
    scheduler = Scheduler(Limits(tokens, rows, 1000, slots, cache := data.draw(st.integers(60, 300))))
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
    for work in WORKS:
        assert [one for one in order if one.work == work] == [
            one for one in requests if one in order and one.work == work
        ]


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
