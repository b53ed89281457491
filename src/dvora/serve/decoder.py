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
from .requests import Answer, Finish, Piece, Request
from .scheduler import Batch, Limits

BROKEN = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer gives for the beginning of a letter of which tokens are still to come."""


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
        if now.endswith(BROKEN) or len(now) <= len(before):
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
    finish: Finish | None = None


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
        self.drop([text for text in self.texts if text.request.is_cancelled])
        texts, logits = self._prefill(batch.requests) if batch.kind == "prefill" else self._step()
        for text, row in zip(texts, logits, strict=True):
            text.next = chosen(row, text)
            self._take(text)
        ended = [text for text in self.texts if text.finish is not None]
        self.drop(ended)
        return [(text.request, Answer(finish=text.finish)) for text in ended]

    def drop(self, texts: Sequence[_Text]) -> None:
        """Free the rows of texts; the last rows take their places."""
        for text in texts:
            row, last = self.texts.index(text), len(self.texts) - 1
            if row != last:
                self.cache.move(last, row, self.texts[last].length)
                self.texts[row] = self.texts[last]
            self.texts.pop()

    @property
    def running(self) -> list[Request]:
        """The requests whose texts are generated."""
        return [text.request for text in self.texts]

    def _prefill(self, requests: Sequence[Request]) -> tuple[list[_Text], Tensor]:
        lengths = [len(request.tokens) for request in requests]
        ids = torch.zeros(len(requests), max(lengths), dtype=torch.long)
        for row, request in zip(ids, requests, strict=True):
            row[: len(request.tokens)] = torch.tensor(request.tokens)
        everyone = [*self.running, *requests]
        self.cache.reserve(len(everyone), max(request.room for request in everyone))
        positions = torch.arange(max(lengths)).expand(len(requests), -1)
        logits = self._pass(requests, ids, len(self.texts), positions, torch.tensor(lengths) - 1)
        texts = [self._text(request) for request in requests]
        self.texts += texts
        return texts, logits

    def _step(self) -> tuple[list[_Text], Tensor]:
        if not self.texts:
            return [], torch.empty(0)
        ids = torch.tensor([[text.next] for text in self.texts])
        positions = torch.tensor([[text.length] for text in self.texts])
        logits = self._pass(self.running, ids, 0, positions, torch.zeros(len(ids), dtype=torch.long))
        for text in self.texts:
            text.length += 1
        return self.texts, logits

    def _pass(self, requests: Sequence[Request], ids: Tensor, first: int, positions: Tensor, wanted: Tensor) -> Tensor:
        """Logits of one token of every row, (rows, vocabulary), on the CPU."""
        model, device = self.base.model, self.base.device
        positions = positions.to(device)
        self.cache.begin(first, positions)
        arguments = {
            "attention_mask": self.cache.mask(model.dtype),
            "position_ids": positions,
            self._cache_argument: self.cache,
            "use_cache": True,
        }
        self.base.enter([request.adapter for request in requests])
        # Only of tokens that something follows: logits have the size of the vocabulary.
        kept, places = wanted.unique(return_inverse=True)
        logits: Tensor = model(input_ids=ids.to(device), logits_to_keep=kept.to(device), **arguments).logits
        return logits[torch.arange(len(ids)), places].float().cpu()

    def _text(self, request: Request) -> _Text:
        seed = request.sampling.seed
        generator = torch.Generator().manual_seed(secrets.randbits(63) if seed is None else seed)
        stream = TextStream(self.base.tokenizer, request.sampling.stop)
        return _Text(request, stream, generator, len(request.tokens))

    def _take(self, text: _Text) -> None:
        """Tell the client of the chosen token, and see whether the text ends with it."""
        sampling, stream = text.request.sampling, text.stream
        if text.next in self.ends:
            text.finish = "stop"
            piece = stream.rest()
        else:
            piece = stream.add(text.next)
            full = len(stream.tokens) >= sampling.max_tokens or text.length >= self.longest
            if stream.is_stopped:
                text.finish = "stop"
            elif full:
                text.finish = "length"
                piece += stream.rest()
        text.request.hear(text.request, Piece(piece, len(stream.tokens)))


def chosen(logits: Tensor, text: _Text) -> int:
    """The next token, by the request's sampling.

    Args:
        logits: (vocabulary,).
        text: which it follows.
    """
    sampling = text.request.sampling
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities = (logits / sampling.temperature).softmax(0)
    if sampling.top_p == 1:
        return int(torch.multinomial(probabilities, 1, generator=text.generator))
    ordered, ids = probabilities.sort(descending=True)
    # Those before which the others together have less than top_p; always the first.
    kept = ordered * (ordered.cumsum(0) - ordered < sampling.top_p)
    return int(ids[torch.multinomial(kept, 1, generator=text.generator)])


def ends_of(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text."""
    ends = model.generation_config.eos_token_id
    return frozenset({*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None})
