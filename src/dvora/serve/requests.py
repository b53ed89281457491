"""What the engine is asked for, one row of a batch a request, and how it can be refused."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from starlette.exceptions import HTTPException

if TYPE_CHECKING:
    from ..bank import Version

Work = Literal["classify", "embed", "generate"]
Finish = Literal["stop", "length"]


class RefusedError(HTTPException):
    """A request that is not served: with a status, what was wrong, expected and to do, and its kind for programs."""

    def __init__(
        self, status: int, message: str, kind: str = "invalid_request_error", headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(status, message, headers or {})
        self.status, self.message, self.kind = status, message, kind


def not_finite() -> RefusedError:
    """What a row is told whose outputs are not finite numbers: it alone, since rows have nothing in common."""
    return RefusedError(
        422, "the adapter's outputs for this text are not finite; look whether its training diverged", "adapter_error"
    )


def model_failed() -> RefusedError:
    """What the rows of a batch are told whose error is the server's; its log has it."""
    return RefusedError(500, "the model failed on this input; the server's log says why", "server_error")


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when generation ends."""

    max_tokens: int = 16
    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Only the likeliest tokens that have this probability together."""
    seed: int | None = None
    """None draws another one for every request."""
    stop: tuple[str, ...] = ()
    """Texts before which generation ends."""
    chances: int | None = None
    """How many of the likeliest tokens are listed beside each chosen one; None lists none, not even that."""


class Answer(NamedTuple):
    """What came out for a request: the last thing that is delivered."""

    values: Any = None
    """Logits of a head, or an embedding: a tensor on the CPU. None for generated text, which comes in pieces."""
    finish: Finish | None = None
    error: RefusedError | None = None


class Chance(NamedTuple):
    """The log-probability of a token, and those of the likeliest ones beside it."""

    token: int
    logarithm: float
    likeliest: tuple[tuple[int, float], ...] = ()


class Piece(NamedTuple):
    """What a generated token adds to a text: nothing, where it ends the text or what it means is not certain yet."""

    text: str
    chance: Chance | None = None
    """Of the token, where the request wants it."""


@dataclass(eq=False)
class Request:
    """One row of a batch."""

    work: Work
    version: Version | None
    """Of the adapter, held as long as somebody waits; None is the base."""
    tokens: Sequence[int]
    deliver: Callable[[Request, Piece | Answer], None]
    """Called in the engine's thread with pieces and the answer."""
    sampling: Sampling = Sampling()
    token_types: Sequence[int] | None = None
    number: int = 0
    """Among those that were asked for together."""
    queue: str = ""
    """In which it waits, beside those of other clients, which take turns."""
    deadline: float = inf
    """By `time.monotonic`, when nobody waits for it any more."""
    arrived: float = field(default_factory=time.monotonic)
    generated: list[int] = field(default_factory=list)
    """Tokens so far, which are read again where a text has lost its row."""
    state: Any = None
    """What the decoder keeps of a text."""
    is_cancelled: bool = False

    def is_wanted(self, now: float) -> bool:
        """Whether somebody still waits for the answer."""
        return not self.is_cancelled and now < self.deadline

    @property
    def length(self) -> int:
        """Tokens that a pass over it reads."""
        return len(self.tokens) + len(self.generated)

    def cached(self, spare: int) -> int:
        """Tokens of a text in the cache, and up to so many more, if it may still get them."""
        if self.work != "generate":
            return 0
        return min(self.length + spare, len(self.tokens) + self.sampling.max_tokens)

    def answer(self, answer: Answer) -> None:
        """Deliver the answer, unless nobody waits for it."""
        if not self.is_cancelled:
            self.deliver(self, answer)
