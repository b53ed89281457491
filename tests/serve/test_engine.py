"""One batch, many clients: what one of them sends or uploads changes nobody else's answer."""

import asyncio
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from dvora.serve.requests import Answer, Piece, RefusedError, Request, Sampling
from dvora.serve.server import Server
from dvora.serve.settings import Settings
from tests.serve.served import TEXTS, Alone, copied

VALUES = "adapter_model.safetensors"


class Text(NamedTuple):
    """What somebody got."""

    pieces: list[Piece]
    answer: Answer

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def probabilities(self) -> list[float]:
        values: list[float] = self.answer.values.softmax(-1).tolist()
        return values


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

    def __init__(self, server: Server, requests: Sequence[Mapping[str, Any]]) -> None:
        self._pieces: dict[Request, list[Piece]] = {}
        self._answers: dict[Request, Answer] = {}
        self._begun, self._ended = threading.Event(), threading.Event()
        for one in requests:
            work = server.base.works[0]
            tokens = tokens_of(server, one.get("text", "the "))
            sampling = Sampling(**{"max_tokens": 12, "temperature": 0, **one.get("sampling", {})})
            version = server.registry.version(one["adapter"])
            request = Request(work, version, tokens, self._deliver, sampling, queue=one.get("queue", ""))
            self._pieces[request] = []
        server.engine.submit([*self._pieces])

    def _deliver(self, request: Request, part: Piece | Answer) -> None:
        if isinstance(part, Piece):
            self._pieces[request].append(part)
            self._begun.set()
        else:
            self._answers[request] = part
        if len(self._answers) == len(self._pieces):
            self._ended.set()

    def wait_for_piece(self) -> None:
        assert self._begun.wait(60)

    @property
    def requests(self) -> list[Request]:
        return [*self._pieces]

    def texts(self) -> list[Text]:
        assert self._ended.wait(60)
        return [Text(pieces, self._answers[request]) for request, pieces in self._pieces.items()]


def ask(server: Server, *requests: Mapping[str, Any]) -> list[Text]:
    return Sent(server, requests).texts()


def batches(server: Server, kind: str) -> float:
    return server.metrics.registry.get_sample_value("dvora_batches_total", {"kind": kind}) or 0.0


def diverging(folder: Path, vector: str = "magnitude", factor: float = 1e30) -> None:
    """Change an adapter so that its values are finite, and its outputs are not."""
    file = folder / VALUES
    values = load_file(file)
    changed = {name: value * (factor if vector in name else 1) for name, value in values.items()}
    assert any(not torch.equal(changed[name], value) for name, value in values.items())
    save_file(changed, file, metadata={"format": "pt"})


@pytest.mark.parametrize("sampling", [{"temperature": 1e-40}, {"temperature": 5e-324}, {"top_p": 1e-320}])
def test_no_sampling_breaks_a_text(
    sampling: dict[str, float], llama: Path, language_adapters: Path, tmp_path: Path
) -> None:
    alone = Alone(llama)
    with started(llama, copied(language_adapters, tmp_path / "adapters")) as server:
        sampled, *greedy = ask(
            server,
            {"adapter": "a0", "sampling": {"temperature": 1.0, **sampling}},
            {"adapter": "a1"},
            {"adapter": None, "text": "Once upon"},
        )
        assert batches(server, "prefill") == 1
    # Only the likeliest token is left.
    assert sampled.text == alone.continued(language_adapters / "a0", "the ", 12)
    assert greedy[0].text == alone.continued(language_adapters / "a1", "the ", 12)
    assert greedy[1].text == alone.continued(None, "Once upon", 12)


def test_a_text_that_is_not_finite_fails_alone_and_leaves_nothing(
    llama: Path, language_adapters: Path, tmp_path: Path
) -> None:
    alone, adapters = Alone(llama), copied(language_adapters, tmp_path / "adapters")
    diverging(adapters / "a0")
    with started(llama, adapters) as server:
        for hostile in ("the ", "0123456789 " * 3, "a"):
            # Rows are used again, also beside a longer one, whose tokens all of them are masked at.
            bad, *good = ask(
                server,
                {"adapter": "a0", "text": hostile},
                {"adapter": "a1"},
                {"adapter": "a2", "text": "a"},
                {"adapter": "a3", "text": "0123456789 " * 3},
            )
            assert isinstance(bad.answer.error, RefusedError)
            assert (bad.answer.error.status, bad.answer.error.kind) == (422, "adapter_error")
            for text, (name, prompt) in zip(
                good, (("a1", "the "), ("a2", "a"), ("a3", "0123456789 " * 3)), strict=True
            ):
                assert text.text == alone.continued(language_adapters / name, prompt, 12)
        assert batches(server, "prefill") == 3
        decoder = server.engine._decoder
        assert decoder is not None
        # Whoever had the rows, nothing of it is there.
        assert not any(held.any() for layer in decoder.cache.of_layers for held in layer.held)


@pytest.mark.parametrize("work", ["classify", "embed"])
def test_a_row_of_an_encoder_that_is_not_finite_fails_alone(
    work: str, bert: Path, classifiers: Path, tmp_path: Path
) -> None:
    adapters = copied(classifiers, tmp_path / "adapters")
    copied(classifiers / "two", adapters / "other")
    diverging(adapters / "two", "classifier" if work == "classify" else "magnitude", 1e38)
    with started(bert, adapters) as server:
        ended, answers = threading.Event(), dict[Request, Answer]()

        def deliver(request: Request, answer: Piece | Answer) -> None:
            answers[request] = answer  # type: ignore[assignment]
            if len(answers) == 2:
                ended.set()

        tokens = tokens_of(server, "good movie")
        bad, good = (
            Request(work, server.registry.version(name), tokens, deliver)  # type: ignore[arg-type]
            for name in ("two", "other")
        )
        server.engine.submit([bad, good])
        assert ended.wait(60)
        assert batches(server, work) == 1
    assert isinstance(answers[bad].error, RefusedError)
    assert answers[good].error is None
    assert answers[good].values.isfinite().all()


def test_an_adapter_that_cannot_be_read_any_more_fails_alone(critic: Path, trained: Path, tmp_path: Path) -> None:
    adapters = copied(trained, tmp_path / "adapters")
    with started(critic, adapters, host_memory=5e-6, slots=2) as server:
        assert server.base.bank.stats().host_adapters < 3
        # Out of its slot, too.
        ask(server, {"adapter": "a1", "text": TEXTS[0]}, {"adapter": "a2", "text": TEXTS[0]})
        (adapters / "a0" / VALUES).unlink()
        before = batches(server, "classify")
        bad, good = ask(server, {"adapter": "a0", "text": TEXTS[0]}, {"adapter": "a1", "text": TEXTS[0]})
        assert batches(server, "classify") == before + 1
    assert isinstance(bad.answer.error, RefusedError)
    assert bad.answer.error.status == 422
    assert str(adapters) not in bad.answer.error.message
    assert good.probabilities == Alone(critic).answer(trained / "a1")


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
            {"adapter": "a1", "text": TEXTS[0]},
        )
        handle.remove()
        errors = [text.answer.error for text in failed]
        assert [error.status for error in errors if error is not None] == [500, 500]
        assert [tuple(shape) for shape in passes] == [(2, 9), (1, 4)]
        assert good.probabilities == alone.answer(trained / "a1")
        assert ask(server, {"adapter": "a2", "text": nine})[0].probabilities == alone.answer(trained / "a2", nine)


def test_chances_are_the_models_and_the_end_is_a_token(llama: Path, language_adapters: Path, tmp_path: Path) -> None:
    alone = Alone(llama)
    expected = alone.continued(language_adapters / "a1", "the ", 12)
    with started(llama, copied(language_adapters, tmp_path / "adapters")) as server:
        plain, listed, stopped = ask(
            server,
            {"adapter": "a1"},
            {"adapter": "a1", "sampling": {"temperature": 0.7, "seed": 1, "chances": 3}},
            {"adapter": "a1", "sampling": {"stop": (expected[3:6],)}},
        )
        decoder = server.engine._decoder
        assert decoder is not None
        decoder.ends |= {listed.pieces[4].chance.token}
        (ended,) = ask(server, {"adapter": "a1", "sampling": {"temperature": 0.7, "seed": 1, "chances": 0}})
    assert not any(piece.chance for piece in plain.pieces)
    ids = alone.tokenizer("the ")["input_ids"]
    for piece in listed.pieces:
        chance = piece.chance
        assert chance is not None
        with torch.no_grad():
            logits = alone.merged(language_adapters / "a1", None)(torch.tensor([ids])).logits[0, -1]
        logarithms = logits.double().log_softmax(0)
        assert chance.logarithm == pytest.approx(float(logarithms[chance.token]), abs=1e-4)
        assert [token for token, _ in chance.likeliest] == logarithms.topk(3).indices.tolist()
        ids.append(chance.token)
    assert len(listed.pieces) == 12
    assert (len(ended.pieces), ended.answer.finish) == (5, "stop")
    assert (len(stopped.pieces), stopped.text, stopped.answer.finish) == (6, expected[:3], "stop")


@pytest.fixture(scope="module")
def long_llama(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with room for longer texts."""
    base = copied(llama, tmp_path_factory.mktemp("long") / "llama")
    for name, setting in (("config.json", "max_position_embeddings"), ("tokenizer_config.json", "model_max_length")):
        settings = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps({**settings, setting: 512}))
    return base


def test_texts_that_lose_their_rows_go_on_where_they_were(
    long_llama: Path, language_adapters: Path, tmp_path: Path
) -> None:
    alone = Alone(long_llama)
    sampled: Mapping[str, Any] = {"adapter": "a5", "sampling": {"max_tokens": 200, "temperature": 1.0, "seed": 5}}
    with started(long_llama, copied(language_adapters, tmp_path / "adapters"), cache_tokens=512) as server:
        (expected,) = ask(server, sampled)
        before = batches(server, "prefill")
        names = ("a0", "a3", "a0", "a3", "a0")
        *greedy, last = ask(server, *({"adapter": name, "sampling": {"max_tokens": 200}} for name in names), sampled)
        assert batches(server, "prefill") > before + 2
        decoder = server.engine._decoder
        assert decoder is not None
        assert decoder.cache.rows * decoder.cache.room <= 512
    for name, text in zip(names, greedy, strict=True):
        assert text.text == alone.continued(language_adapters / name, "the ", 200)
        assert len(text.pieces) == 200
    assert (last.text, last.answer) == (expected.text, expected.answer)


def test_a_short_text_does_not_wait_for_the_long_ones_of_another_queue(
    long_llama: Path, language_adapters: Path, tmp_path: Path
) -> None:
    with started(long_llama, copied(language_adapters, tmp_path / "adapters"), batch_rows=4) as server:
        long = Sent(server, [{"adapter": "a0", "queue": "many", "sampling": {"max_tokens": 150}}] * 8)
        for number in range(1, 6):
            (text,) = ask(server, {"adapter": f"a{number}", "queue": "single", "sampling": {"max_tokens": 3}})
            assert text.answer == Answer(finish="length")
        assert not long._ended.is_set()
        assert all(text.answer == Answer(finish="length") for text in long.texts())
        merged = Alone(long_llama).merged(language_adapters / "a0", None)
        for request in long.requests:
            # Read anew in another shape a tie of two tokens may fall otherwise, so each token is compared by itself.
            ids = torch.tensor([[*request.tokens, *request.generated]])
            with torch.no_grad():
                logits = merged(ids).logits[0, len(request.tokens) - 1 : -1]
            chosen = logits.gather(1, ids[0, len(request.tokens) :, None])[:, 0]
            assert (logits.amax(1) - chosen).max() < 1e-4


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
        assert all(text.answer.error is None for other in others for text in other.texts())
        errors = [text.answer.error for flood in floods for text in flood.texts()]
        assert [error.status for error in errors if isinstance(error, RefusedError)] == [429] * 3
