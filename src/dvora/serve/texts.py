"""Texts as tokens, beside the loop: clients take turns in a thread, and short texts do not wait for long ones."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar, cast
from weakref import WeakValueDictionary

from ..recipes.data.entities import Offsets
from .base import Base
from .requests import RefusedError

PORTION, SHORT = 2**12, 2**14
"""Characters of texts that are read at once, and of one that is read in milliseconds."""
MANY = 2**16
"""Characters of a text that are read whatever the model takes: of spaces and unknown words few tokens may be left."""
MOST = 2**22
"""Characters of all texts of a request, of which a route may read one more than once."""
T = TypeVar("T")
Input = str | Sequence[str] | Sequence[int]
"""A text, a pair, or tokens."""


class Turns:
    """A thread, used from one event loop, in which clients take turns: each waits for one call of another."""

    def __init__(self, name: str) -> None:
        self._thread, self._turn = ThreadPoolExecutor(1, name), asyncio.Lock()
        self._clients = WeakValueDictionary[str, asyncio.Lock]()

    def close(self) -> None:
        """End the thread, once it has ended what it does."""
        self._thread.shutdown(cancel_futures=True)

    async def run(self, client: str, function: Callable[..., T], *arguments: Any) -> T:
        """What a function gives that is called in the thread, when the client's turn has come."""
        # Of each client one call is in the line for the thread.
        async with self._clients.setdefault(client, asyncio.Lock()), self._turn:
            running = asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)
            try:
                return await asyncio.shield(running)
            finally:
                # What has begun is ended before the next turn, also where nobody waits for it any more.
                if not running.done():
                    await asyncio.wait({running})


class Text(NamedTuple):
    """A text, or a pair of them, as tokens."""

    tokens: Sequence[int]
    types: Sequence[int] | None = None
    text: str = ""
    offsets: Offsets | None = None
    """Where the tokens are in the text, for a model that classifies them."""


class Texts:
    """Reads texts for a model, of so many tokens at most."""

    def __init__(self, base: Base, longest: int) -> None:
        self.name, self.longest, self.has_tags = base.name, longest, base.has_tags
        self.vocabulary = base.model.get_input_embeddings().num_embeddings
        # A space between words is of no piece in many vocabularies.
        self.most_characters = max(MANY, longest * (1 + max(map(len, base.tokenizer.get_vocab()))))
        # To truncate changes a tokenizer, so each thread has one, and the engine pads with its own.
        self._lanes = [(Turns("dvora-texts"), copy.deepcopy(base.tokenizer)) for _ in range(2)]

    def close(self) -> None:
        """End the threads."""
        for turns, _ in self._lanes:
            turns.close()

    async def run(self, size: int, queue: str, function: Callable[..., T], *arguments: Any) -> T:
        """What a function gives that is called with a tokenizer in a thread, when the client's queue has its turn.

        What is short, by its size in characters or numbers, does not wait for what is long.
        """
        turns, tokenizer = self._lanes[size > SHORT]
        return await turns.run(queue, function, tokenizer, *arguments)

    async def read(self, texts: Sequence[Input], queue: str, *, truncate: bool = False) -> list[Text]:
        """Texts, pairs, or tokens, as the model reads them; 400, if one is empty or too long, or all together are.

        Args:
            texts: as a client sent them.
            queue: of the client.
            truncate: cut what is longer than the model reads, in place of a refusal.
        """
        read, sizes = list[Text](), [_size(text) for text in texts]
        if (size := sum(sizes)) > MOST:
            raise RefusedError(400, f"the texts have {size:,} characters, and at most {MOST:,} are read; send fewer")
        while (first := len(read)) < len(texts):
            last, size = first + 1, sizes[first]
            while last < len(texts) and size + sizes[last] <= PORTION:
                last, size = last + 1, size + sizes[last]
            read += await self.run(size, queue, self._read, texts[first:last], truncate)
        return read

    def _read(self, tokenizer: Any, texts: Sequence[Input], truncate: bool) -> list[Text]:
        return [self._text(tokenizer, text, truncate) for text in texts]

    def _text(self, tokenizer: Any, text: Input, truncate: bool) -> Text:
        if not isinstance(text, str) and (not text or isinstance(text[0], int)):
            ids = cast(Sequence[int], text[: self.longest] if truncate else text)
            if ids and not 0 <= min(ids) <= max(ids) < self.vocabulary:
                raise RefusedError(400, f"a token is not from 0 to {self.vocabulary - 1}; use the base's tokenizer")
            read = Text(ids)
        else:
            parts = [text] if isinstance(text, str) else [str(part) for part in text]
            if truncate:
                parts = [part[: self.most_characters] for part in parts]
            self.check(max(map(len, parts), default=0))
            cut = {"truncation": True, "max_length": self.longest} if truncate else {}
            places = {"return_offsets_mapping": self.has_tags and len(parts) == 1}
            encoded = tokenizer(*parts, verbose=False, **cut, **places)
            offsets = encoded.get("offset_mapping")
            read = Text(encoded["input_ids"], encoded.get("token_type_ids"), parts[0] if offsets else "", offsets)
        if not read.tokens:
            raise RefusedError(400, "the input has no tokens; send a text")
        if (count := len(read.tokens)) > self.longest:
            message = f"the input has {count:,} tokens, and at most {self.longest:,} are read"
            raise RefusedError(400, f"{message}; send a shorter one, or truncate: true")
        return read

    def check(self, characters: int) -> None:
        """Refuse, unread and with 400, a text of more characters than the tokens that the model takes can have."""
        if characters > self.most_characters:
            raise RefusedError(
                400,
                f"the input has {characters:,} characters, and at most {self.most_characters:,} are read, since "
                f"{self.name} takes {self.longest:,} tokens; send a shorter one",
            )


def _size(text: Input) -> int:
    return len(text) if isinstance(text, str) or (text and isinstance(text[0], int)) else sum(map(len, map(str, text)))
