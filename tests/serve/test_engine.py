"""One batch, many clients: what one of them sends or uploads changes nobody else's answer."""

import asyncio
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dvora.serve.requests import Answer, RefusedError, Request, Work
from dvora.serve.server import Server
from dvora.serve.settings import Settings
from tests.serve.served import TEXTS, Alone, copied

VALUES = "adapter_model.safetensors"


@contextmanager
def started(base: Path, adapters: Path, **settings: Any) -> Iterator[Server]:
    """A server without HTTP, whose adapters have been read, and which runs together whatever fits."""
    settings = {"batch_rows": 8, "slots": 16, **settings}
    server = Server(Settings(base=str(base), adapters=adapters, **settings))
    server.engine._scheduler.pass_tokens = 10**6
    for version in server.registry.versions():
        server.registry.read(version.name)
    try:
        yield server
    finally:
        server.close()


def tokens_of(server: Server, text: str) -> Sequence[int]:
    (read,) = asyncio.run(server.texts.read([text], ""))
    return read.tokens


class Sent:
    """Requests that were sent at once, so that they are one batch where they fit."""

    def __init__(self, server: Server, requests: Sequence[Mapping[str, Any]], work: Work = "classify") -> None:
        self._answers: dict[Request, Answer] = {}
        self._ended = threading.Event()
        self._requests = [
            Request(
                work,
                server.registry.version(one["adapter"]),
                tokens_of(server, one.get("text", TEXTS[0])),
                self._deliver,
                queue=one.get("queue", ""),
            )
            for one in requests
        ]
        server.engine.submit(self._requests)

    def _deliver(self, request: Request, answer: Answer) -> None:
        self._answers[request] = answer
        if len(self._answers) == len(self._requests):
            self._ended.set()

    def answers(self) -> list[Answer]:
        assert self._ended.wait(60)
        return [self._answers[request] for request in self._requests]


def ask(server: Server, *requests: Mapping[str, Any], work: Work = "classify") -> list[Answer]:
    return Sent(server, requests, work).answers()


def probabilities(answer: Answer) -> list[float]:
    values: list[float] = answer.values.softmax(-1).tolist()
    return values


def batches(server: Server, kind: str) -> float:
    return server.metrics.registry.get_sample_value("dvora_batches_total", {"kind": kind}) or 0.0


def diverging(folder: Path, vector: str = "magnitude", factor: float = 1e30) -> None:
    """Change an adapter so that its values are finite, and its outputs are not."""
    file = folder / VALUES
    values = load_file(file)
    changed = {name: value * (factor if vector in name else 1) for name, value in values.items()}
    assert any(not torch.equal(changed[name], value) for name, value in values.items())
    save_file(changed, file, metadata={"format": "pt"})


@pytest.mark.parametrize("work", ["classify", "embed"])
def test_a_row_that_is_not_finite_fails_alone(work: Work, bert: Path, classifiers: Path, tmp_path: Path) -> None:
    adapters = copied(classifiers, tmp_path / "adapters")
    copied(classifiers / "two", adapters / "other")
    diverging(adapters / "two", "classifier" if work == "classify" else "magnitude", 1e38)
    with started(bert, adapters) as server:
        bad, good = ask(server, {"adapter": "two"}, {"adapter": "other"}, work=work)
        assert batches(server, work) == 1
    assert isinstance(bad.error, RefusedError)
    assert (bad.error.status, bad.error.kind) == (422, "adapter_error")
    assert good.error is None
    assert good.values.isfinite().all()


def test_an_adapter_that_cannot_be_read_any_more_fails_alone(critic: Path, trained: Path, tmp_path: Path) -> None:
    adapters = copied(trained, tmp_path / "adapters")
    with started(critic, adapters, host_memory=5e-6, slots=2) as server:
        assert server.base.bank.stats().host_adapters < 3
        # Out of its slot, too.
        ask(server, {"adapter": "a1"}, {"adapter": "a2"})
        (adapters / "a0" / VALUES).unlink()
        before = batches(server, "classify")
        bad, good = ask(server, {"adapter": "a0"}, {"adapter": "a1"})
        assert batches(server, "classify") == before + 1
    assert isinstance(bad.error, RefusedError)
    assert bad.error.status == 422
    assert str(adapters) not in bad.error.message
    assert probabilities(good) == Alone(critic).answer(trained / "a1")


def test_a_pass_that_fails_is_not_run_again_and_ends_its_own_rows_only(
    critic: Path, trained: Path, tmp_path: Path
) -> None:
    alone, passes, nine = Alone(critic), [], "good " * 7
    with started(critic, copied(trained, tmp_path / "adapters"), batch_tokens=18) as server:

        def fail(_: object, arguments: tuple[torch.Tensor, ...]) -> None:
            passes.append(arguments[0].shape[:2])
            if arguments[0].shape[1] == 9:
                raise MemoryError("no room for nine tokens")

        handle = server.base.model.bert.encoder.layer[-1].register_forward_pre_hook(fail)
        *failed, good = ask(
            server,
            {"adapter": "a2", "text": nine},
            {"adapter": "a3", "text": nine},
            {"adapter": "a1"},
        )
        handle.remove()
        errors = [answer.error for answer in failed]
        assert [error.status for error in errors if error is not None] == [500, 500]
        assert [tuple(shape) for shape in passes] == [(2, 9), (1, 4)]
        assert probabilities(good) == alone.answer(trained / "a1")
        assert probabilities(*ask(server, {"adapter": "a2", "text": nine})) == alone.answer(trained / "a2", nine)


def test_a_flood_is_told_of_itself_and_others_get_in(bert: Path, classifiers: Path, tmp_path: Path) -> None:
    with started(bert, copied(classifiers, tmp_path / "adapters"), batch_rows=1, queue=10) as server:
        refused: list[RefusedError] = []
        with server.base.passing:
            floods = [Sent(server, [{"adapter": "two", "queue": "flood"}]) for _ in range(10)]
            while len(floods) < 20:
                try:
                    floods.append(Sent(server, [{"adapter": "two", "queue": "flood"}]))
                except RefusedError as error:
                    refused.append(error)
                    break
            others = [Sent(server, [{"adapter": "three", "queue": "other"}]) for _ in range(3)]
        assert refused[0].status == 429
        assert refused[0].headers == {"Retry-After": "1"}
        assert "10 requests" in refused[0].message
        assert all(answer.error is None for other in others for answer in other.answers())
        errors = [answer.error for flood in floods for answer in flood.answers()]
        assert [error.status for error in errors if isinstance(error, RefusedError)] == [429] * 3
