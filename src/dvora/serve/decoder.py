"""Generation of many texts at once: prompts come in and texts end between any two steps, each row with its adapter.

There is no cache of prompts: keys and values of a text are computed with its adapter, in its row, and leave with it.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..export.graph import cache_argument
from .base import Base
from .cache import RowCache, check_cacheable
from .requests import Answer, Chance, Piece, Request, not_finite
from .scheduler import Batch
from .settings import Limits

BROKEN = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer gives for the beginning of a letter of which tokens are still to come."""
LONGEST_LETTER = 16
"""Tokens, after which what they give is certain."""


class TextStream:
    """The text of tokens that come one by one: given out as soon as it is certain.

    Held back are letters whose tokens are incomplete, and what may be the beginning of a stop text.

    Args:
        tokenizer: of the base.
        stop: texts before which generation ends.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.tokens: list[int] = []
        self.is_stopped = False
        self._first = self._read = 0
        """Tokens that are decoded together, since spaces depend on what stands before, and those that were given."""
        self._held = ""

    def add(self, token: int) -> str:
        """Take one more token, and give what text is certain now."""
        self.tokens.append(token)
        before = self._decoded(self.tokens[self._first : self._read])
        now = self._decoded(self.tokens[self._first :])
        # A letter has four bytes at most: what is incomplete for longer is none, and special tokens have no text.
        is_waiting = now.endswith(BROKEN) or len(now) <= len(before)
        if is_waiting and len(self.tokens) - self._read < LONGEST_LETTER:
            return ""
        self._first, self._read = self._read, len(self.tokens)
        return self._certain(now[len(before) :])

    def rest(self) -> str:
        """What was held back, when no tokens follow."""
        before = self._decoded(self.tokens[self._first : self._read])
        now = self._decoded(self.tokens[self._first :])
        text = "" if self.is_stopped else self._certain(now[len(before) :]) + self._held
        self._held = ""
        return text

    def _certain(self, text: str) -> str:
        text, self._held = self._held + text, ""
        if ends := [place for stop in self.stop if (place := text.find(stop)) >= 0]:
            self.is_stopped = True
            return text[: min(ends)]
        for length in range(min(len(text), max(map(len, self.stop), default=0)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self.stop):
                self._held = text[-length:]
                return text[:-length]
        return text

    def _decoded(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


@dataclass(eq=False)
class _Text:
    """A text that is generated."""

    request: Request
    stream: TextStream
    generator: torch.Generator
    length: int
    """Tokens in the cache."""
    next: int = 0
    """The token that the next step reads."""
    answer: Answer | None = None
    """Once it has ended."""


@dataclass(eq=False)
class Decoder:
    """The passes of a language model.

    Args:
        base: with its bank.
        limits: of the server.
        longest: tokens of a prompt and its continuation.
    """

    base: Base
    limits: Limits
    longest: int
    texts: list[_Text] = field(default_factory=list)
    """By their rows in the cache."""

    def __post_init__(self) -> None:
        config = self.base.model.config
        check_cacheable(config)
        self.cache = RowCache(config.get_text_config().num_hidden_layers, self.limits.cache_tokens)
        self.ends = ends_of(self.base.model, self.base.tokenizer)
        self._cache_argument = cache_argument(self.base.model)

    @torch.no_grad()
    def run(self, batch: Batch) -> list[tuple[Request, Answer]]:
        """A pass over new prompts, or a step of the texts that run; gives the answers of texts that have ended."""
        texts, logits = self._prefill(batch.requests) if batch.kind == "prefill" else self._step()
        for text, row, is_finite in zip(texts, logits, logits.isfinite().all(-1), strict=True):
            if is_finite:
                self._take(text, row)
            else:
                text.answer = Answer(error=not_finite())
        ended = [(text.request, text.answer) for text in texts if text.answer is not None]
        self.drop([request for request, _ in ended])
        return ended

    def drop(self, requests: Sequence[Request]) -> None:
        """Free the rows of those that have one; the last rows take their places."""
        for text in [text for text in self.texts if text.request in requests]:
            row, last = self.texts.index(text), self.texts.pop()
            self.cache.free(row, text.length, len(self.texts), last.length)
            if last is not text:
                self.texts[row] = last

    @property
    def running(self) -> list[Request]:
        """The requests whose texts are generated."""
        return [text.request for text in self.texts]

    def _prefill(self, requests: Sequence[Request]) -> tuple[list[_Text], Tensor]:
        lengths = [request.length for request in requests]
        ids = torch.zeros(len(requests), max(lengths), dtype=torch.long)
        for row, request in zip(ids, requests, strict=True):
            row[: request.length] = torch.tensor([*request.tokens, *request.generated])
        self.cache.reserve(len(self.texts) + len(requests), max(lengths + [text.length for text in self.texts]))
        texts = [request.state or self._text(request) for request in requests]
        for text in texts:
            text.length = text.request.length
        # Before the pass: if it fails they are dropped with what it has written.
        self.texts += texts
        positions = torch.arange(max(lengths)).expand(len(texts), -1)
        return texts, self._pass(texts, ids, len(self.texts) - len(texts), positions, torch.tensor(lengths) - 1)

    def _step(self) -> tuple[list[_Text], Tensor]:
        texts = list(self.texts)
        ids = torch.tensor([[text.next] for text in texts])
        positions = torch.tensor([[text.length] for text in texts])
        self.cache.reserve(len(texts), int(positions.max()) + 1)
        for text in texts:
            text.length += 1
        return texts, self._pass(texts, ids, 0, positions, torch.zeros(len(ids), dtype=torch.long))

    def _pass(self, texts: Sequence[_Text], ids: Tensor, first: int, positions: Tensor, wanted: Tensor) -> Tensor:
        """Logits of one token of every row, (rows, vocabulary), on the CPU."""
        model, device = self.base.model, self.base.device
        positions = positions.to(device)
        self.cache.begin(first, positions, torch.tensor([text.length for text in texts], device=device))
        arguments = {
            "attention_mask": self.cache.mask(model.dtype),
            "position_ids": positions,
            self._cache_argument: self.cache,
            "use_cache": True,
        }
        self.base.enter([text.request.adapter for text in texts])
        # Only of tokens that something follows: logits have the size of the vocabulary.
        kept, places = wanted.unique(return_inverse=True)
        logits: Tensor = model(input_ids=ids.to(device), logits_to_keep=kept.to(device), **arguments).logits
        return logits[torch.arange(len(ids)), places].float().cpu()

    def _text(self, request: Request) -> _Text:
        seed = request.sampling.seed
        generator = torch.Generator().manual_seed(secrets.randbits(63) if seed is None else seed)
        stream = TextStream(self.base.tokenizer, request.sampling.stop)
        request.generated = stream.tokens
        request.state = text = _Text(request, stream, generator, request.length)
        return text

    def _take(self, text: _Text, logits: Tensor) -> None:
        """Choose the next token, tell the client of it, and see whether the text ends with it."""
        sampling, stream = text.request.sampling, text.stream
        text.next = chosen(logits, text)
        tokens = len(stream.tokens) + 1
        if text.next in self.ends:
            text.answer = Answer(finish="stop")
            piece = stream.rest()
        else:
            piece = stream.add(text.next)
            full = tokens >= sampling.max_tokens or text.length >= self.longest
            if stream.is_stopped:
                text.answer = Answer(finish="stop")
            elif full:
                text.answer = Answer(finish="length")
                piece += stream.rest()
        chances = () if sampling.chances is None else (chance_of(logits, text.next, sampling.chances),)
        text.request.hear(text.request, Piece(piece, tokens, chances))


def chosen(logits: Tensor, text: _Text) -> int:
    """The next token, by the request's sampling.

    Args:
        logits: (vocabulary,).
        text: which it follows.
    """
    sampling = text.request.sampling
    if sampling.temperature == 0:
        return int(logits.argmax())
    # In float64 and at most zero: no temperature gives what is not finite, or a sum of nothing.
    logits = logits.double()
    probabilities = ((logits - logits.max()) / sampling.temperature).softmax(0)
    if sampling.top_p == 1:
        return int(torch.multinomial(probabilities, 1, generator=text.generator))
    ordered, ids = probabilities.sort(descending=True)
    # Those before which the others together have less than top_p; always the first.
    kept = ordered * (ordered.cumsum(0) - ordered < sampling.top_p)
    kept[0] = ordered[0]
    return int(ids[torch.multinomial(kept, 1, generator=text.generator)])


def chance_of(logits: Tensor, token: int, count: int) -> Chance:
    """The log-probability of a token at temperature 1, beside those of the likeliest.

    Args:
        logits: (vocabulary,).
        token: which was chosen.
        count: of the likeliest.
    """
    logarithms = logits.double().log_softmax(0)
    values, ids = logarithms.topk(min(count, len(logits)))
    return Chance(token, float(logarithms[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def ends_of(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text."""
    ends = model.generation_config.eos_token_id
    return frozenset({*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None})
