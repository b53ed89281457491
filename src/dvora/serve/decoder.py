"""Generation of many texts at once: prompts come in and texts end between any two steps, each row with its adapter.

There is no cache of prompts: keys and values of a text are computed with its adapter, in its row, and leave with it.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..export.graph import cache_argument
from .base import Base
from .cache import RowCache, check_cacheable
from .requests import Answer, Chance, Finish, Piece, Request, Sampling, not_finite
from .scheduler import Batch

BROKEN = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer gives for the beginning of a letter of which tokens are still to come."""
LONGEST_LETTER = 16
"""Tokens, after which what they give is certain."""


class TextStream:
    """The text of tokens that come one by one, up to a stop text: given out as soon as it is certain.

    Held back are letters whose tokens are incomplete, and what may be the beginning of a stop text.
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
        text = self._new()
        # A letter has four bytes at most: what is incomplete for longer is none, and special tokens have no text.
        if (not text or text.endswith(BROKEN)) and len(self.tokens) - self._read < LONGEST_LETTER:
            return ""
        self._first, self._read = self._read, len(self.tokens)
        return self._certain(text)

    def rest(self) -> str:
        """What was held back, when no tokens follow."""
        text = "" if self.is_stopped else self._certain(self._new()) + self._held
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

    def _new(self) -> str:
        """The text of the tokens behind those that were given."""
        before, now = (
            self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for tokens in (self.tokens[self._first : self._read], self.tokens[self._first :])
        )
        return str(now[len(before) :])


class _State(NamedTuple):
    """Of a text that is generated, also while it has no row."""

    stream: TextStream
    generator: torch.Generator


class Decoder:
    """The passes of a language model, whose prompts and their continuations have so many tokens at most."""

    def __init__(self, base: Base, cache_tokens: int, longest: int) -> None:
        self.base, self.longest = base, longest
        self.running: list[Request] = []
        """Those whose texts are generated, by their rows in the cache."""
        config = base.model.config
        check_cacheable(config)
        self.cache = RowCache(config.get_text_config().num_hidden_layers, cache_tokens)
        ends = base.model.generation_config.eos_token_id
        self.ends = {*(ends if isinstance(ends, list) else [ends]), base.tokenizer.eos_token_id} - {None}
        """Tokens that end a text."""
        self._cache_argument = cache_argument(base.model)

    @torch.no_grad()
    def run(self, batch: Batch) -> list[tuple[Request, Answer]]:
        """A pass over new prompts, or a step of the texts that run; gives the answers of texts that have ended."""
        requests, logits = self._pass(batch.requests if batch.kind == "prefill" else ())
        answers = []
        for request, row, is_finite in zip(requests, logits, logits.isfinite().all(-1), strict=True):
            answer = self._take(request, row) if is_finite else Answer(error=not_finite())
            if answer is not None:
                answers.append((request, answer))
        self.drop([request for request, _ in answers])
        return answers

    def drop(self, requests: Sequence[Request]) -> None:
        """Free the rows of those that have one; the last rows take their places."""
        for request in [request for request in self.running if request in requests]:
            row, last = self.running.index(request), self.running.pop()
            self.cache.free(row, request.length, len(self.running), last.length)
            if last is not request:
                self.running[row] = last

    def _pass(self, new: Sequence[Request]) -> tuple[Sequence[Request], Tensor]:
        """New texts, or else those that run, and the logits of what follows, (rows, vocabulary), on the CPU."""
        running, first = [*self.running, *new], len(self.running) if new else 0
        requests = running[first:]
        # Of those that run only the last token is not in the cache yet.
        unread = [[*request.tokens, *request.generated] if new else request.generated[-1:] for request in requests]
        self.cache.reserve(len(running), max(request.length for request in running))
        for request in new:
            if request.state is None:
                seed, stream = request.sampling.seed, TextStream(self.base.tokenizer, request.sampling.stop)
                generator = torch.Generator().manual_seed(secrets.randbits(63) if seed is None else seed)
                request.state, request.generated = _State(stream, generator), stream.tokens
        # Before the pass: if it fails they are dropped with what it has written.
        self.running = running
        model, device = self.base.model, self.base.model.device
        counts, width = torch.tensor([len(tokens) for tokens in unread]), max(map(len, unread))
        lengths = torch.tensor([request.length for request in requests])
        ids = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens in unread], device=device)
        positions = ((lengths - counts).unsqueeze(-1) + torch.arange(width)).to(device)
        self.cache.begin(first, positions, lengths.to(device))
        arguments = {
            "attention_mask": self.cache.mask(model.dtype),
            "position_ids": positions,
            self._cache_argument: self.cache,
            "use_cache": True,
        }
        self.base.enter([request.version for request in requests])
        # Only of tokens that something follows: logits have the size of the vocabulary.
        last, places = (counts - 1).unique(return_inverse=True)
        logits: Tensor = model(input_ids=ids, logits_to_keep=last.to(device), **arguments).logits
        return requests, logits[torch.arange(len(requests)), places].float().cpu()

    def _take(self, request: Request, logits: Tensor) -> Answer | None:
        """Choose the next token, and deliver what it adds; the answer, if the text ends with it."""
        sampling, stream = request.sampling, request.state.stream
        token = chosen(logits, sampling, request.state.generator)
        is_full = len(stream.tokens) + 1 >= sampling.max_tokens or request.length >= self.longest
        piece = stream.rest() if token in self.ends else stream.add(token)
        finish: Finish | None = None
        if token in self.ends or stream.is_stopped:
            finish = "stop"
        elif is_full:
            finish = "length"
            piece += stream.rest()
        chance = None if sampling.chances is None else chance_of(logits, token, sampling.chances)
        request.deliver(request, Piece(piece, chance))
        return None if finish is None else Answer(finish=finish)


def chosen(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token, by logits, (vocabulary,)."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    # In float64 and at most zero: no temperature gives what is not finite, or a sum of nothing.
    logits = logits.double()
    probabilities = ((logits - logits.max()) / sampling.temperature).softmax(0)
    if sampling.top_p == 1:
        return int(torch.multinomial(probabilities, 1, generator=generator))
    ordered, ids = probabilities.sort(descending=True)
    # Those before which the others together have less than top_p; always the first.
    weights = ordered * (ordered.cumsum(0) - ordered < sampling.top_p)
    weights[0] = ordered[0]
    return int(ids[torch.multinomial(weights, 1, generator=generator)])


def chance_of(logits: Tensor, token: int, count: int) -> Chance:
    """The log-probability of a token at temperature 1 by logits, (vocabulary,), beside those of so many likeliest."""
    logarithms = logits.double().log_softmax(0)
    values, ids = logarithms.topk(min(count, len(logits)))
    return Chance(token, float(logarithms[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
