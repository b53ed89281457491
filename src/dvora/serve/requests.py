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

Work = Literal["classify", "embed"]


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


class Answer(NamedTuple):
    """What came out for a request."""

    values: Any = None
    """Logits of a head, or an embedding: a tensor on the CPU."""
    error: RefusedError | None = None


@dataclass(eq=False)
class Request:
    """One row of a batch."""

    work: Work
    version: Version | None
    """Of the adapter, held as long as somebody waits; None is the base."""
    tokens: Sequence[int]
    deliver: Callable[[Request, Answer], None]
    """Called in the engine's thread."""
    token_types: Sequence[int] | None = None
    number: int = 0
    """Among those that were asked for together."""
    queue: str = ""
    """In which it waits, beside those of other clients, which take turns."""
    deadline: float = inf
    """By `time.monotonic`, when nobody waits for it any more."""
    arrived: float = field(default_factory=time.monotonic)
    is_cancelled: bool = False

    def is_wanted(self, now: float) -> bool:
        """Whether somebody still waits for the answer."""
        return not self.is_cancelled and now < self.deadline

    @property
    def length(self) -> int:
        """Tokens that a pass over it reads."""
        return len(self.tokens)

    def answer(self, answer: Answer) -> None:
        """Deliver the answer, unless nobody waits for it."""
        if not self.is_cancelled:
            self.deliver(self, answer)
