"""Streams of requests: who asks for what, in which order they are answered, how long they wait by a test's clock."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from benchmarks.many_adapters.requests import Answered, closed_loop, open_loop, percentile, poisson, zipf
from benchmarks.many_adapters.stream import summary


@dataclass
class Server:
    """Answers a batch in one second of its own time."""

    time: float = 100.0
    batches: list[list[int]] = field(default_factory=list)
    following: list[list[int]] = field(default_factory=list)

    def now(self) -> float:
        return self.time

    def wait_until(self, moment: float) -> None:
        self.time = max(self.time, moment)

    def serve(self, rows: Sequence[int], following: Sequence[int]) -> None:
        self.batches.append(list(rows))
        self.following.append(list(following))
        self.time += 1


def test_a_closed_loop_answers_in_order_and_clients_ask_again_when_answered() -> None:
    server = Server()
    answered = closed_loop([*range(7)], clients=4, batch=2, serve=server.serve, clock=server)
    assert server.batches == [[0, 1], [2, 3], [4, 5], [6]]
    assert server.following == [[2, 3], [4, 5], [6], []]
    # The first batch waits for itself only, all others for one before them.
    assert answered == Answered([1, 1, 2, 2, 2, 2, 2], seconds=4)


def test_more_requests_than_clients_wait_for_an_answer() -> None:
    server = Server()
    closed_loop([*range(5)], clients=1, batch=8, serve=server.serve, clock=server)
    assert server.batches == [[0], [1], [2], [3], [4]]


def test_an_open_loop_serves_what_has_come_and_waits_where_nothing_has() -> None:
    server = Server()
    answered = open_loop([7, 8, 9], [0.5, 0.75, 10.0], at_most=8, batch=2, serve=server.serve, clock=server)
    assert server.batches == [[7], [8], [9]]
    assert answered == Answered([1, 1.75, 1], seconds=11)


def test_an_open_loop_is_bounded() -> None:
    server = Server()
    moments = [0.0, 0.1, 0.2, 0.3, 0.4]
    answered = open_loop([*range(5)], moments, at_most=2, batch=2, serve=server.serve, clock=server)
    assert server.batches == [[0], [1, 2]]
    assert answered.refused == 2
    assert answered.latencies == pytest.approx([1, 1.9, 1.8])


def test_zipf_asks_for_the_first_as_often_as_its_law_says() -> None:
    found = zipf(count=100, requests=200_000, exponent=1.0, seed=0)
    assert (min(found), max(found)) == (0, 99)
    shares = np.bincount(found) / len(found)
    harmonic = sum(1 / rank for rank in range(1, 101))
    assert shares[[0, 1, 9]] == pytest.approx([1 / harmonic, 1 / (2 * harmonic), 1 / (10 * harmonic)], rel=0.05)
    even = np.bincount(zipf(count=4, requests=40_000, exponent=0.0, seed=0)) / 40_000
    assert even == pytest.approx([0.25] * 4, rel=0.05)


def test_requests_are_those_of_their_seed() -> None:
    assert zipf(9, 50, 1.0, seed=1) == zipf(9, 50, 1.0, seed=1) != zipf(9, 50, 1.0, seed=2)
    assert poisson(50, 3.0, seed=1) == poisson(50, 3.0, seed=1) != poisson(50, 3.0, seed=2)


def test_random_moments_ascend_at_the_rate_that_was_asked_for() -> None:
    moments = poisson(20_000, per_second=4.0, seed=0)
    assert moments == sorted(moments)
    assert moments[-1] == pytest.approx(5_000, rel=0.05)
    # Without memory: gaps have the deviation of their mean.
    assert np.std(np.diff(moments)) == pytest.approx(0.25, rel=0.05)


def test_percentiles() -> None:
    values = [float(value) for value in range(101)]
    assert [percentile(values, share) for share in (0, 0.5, 0.95, 1)] == [0, 50, 95, 100]
    assert percentile([4.0, 2.0], 0.75) == 3.5
    assert percentile([3.0], 0.99) == 3.0
    with pytest.raises(ValueError, match="at least one value"):
        percentile([], 0.5)


def test_a_summary_has_each_round_and_all_together() -> None:
    rounds = [Answered([1.0, 3.0], seconds=2.0), Answered([5.0] * 4, seconds=8.0, refused=3)]
    found = summary(rounds)
    assert found["p50"] == [2.0, 5.0]
    assert found["per_second"] == [1.0, 0.5]
    assert found["together"]["p50"] == 5.0
    assert found["refused"] == 3
