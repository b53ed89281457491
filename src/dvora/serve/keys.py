"""Who asks: what a request may ask for and change. Every route has one of the two dependencies at the end."""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from fnmatch import fnmatchcase

from fastapi import Request

from .requests import RefusedError

BASE = "base"
"""In patterns and headers, in place of an adapter: the base alone. No adapter has this name."""


@dataclass(frozen=True)
class Key:
    """What a client may do.

    Args:
        tenant: whose it is; None where nobody has keys.
        names: patterns of the adapters that it sees, as in a shell; of others it does not learn that they exist.
        may_change: whether it may put and delete those.
    """

    tenant: str | None = None
    names: tuple[str, ...] = ("*",)
    may_change: bool = False

    def sees(self, name: str | None) -> bool:
        """Whether an adapter exists for it; None is the base."""
        return any(fnmatchcase(BASE if name is None else name, pattern) for pattern in self.names)

    def queue_of(self, name: str | None) -> str:
        """In which queue its requests wait: its own, or without keys that of the adapter."""
        return self.tenant if self.tenant is not None else BASE if name is None else name

    def spend(self, tokens: int) -> None:
        """Count tokens that were read or generated for it."""


class Keys:
    """The keys of a server.

    Args:
        token: of whoever may change adapters; None: nobody may.
    """

    def __init__(self, token: str | None) -> None:
        self.token = token

    def key_of(self, authorization: str) -> Key:
        """The key that a request came with.

        Raises:
            RefusedError: 401, there is none of that.
        """
        is_admin = self.token is not None and _equal(authorization, f"Bearer {self.token}")
        return Key(may_change=is_admin)


def asking(request: Request) -> Key:
    """A dependency of every route that answers with what adapters say, or what there is."""
    keys: Keys = request.app.state.server.keys
    return keys.key_of(request.headers.get("authorization", ""))


def changing(request: Request) -> Key:
    """A dependency of every route that changes adapters.

    Raises:
        RefusedError: 403, nobody may; 401, this client may not.
    """
    keys: Keys = request.app.state.server.keys
    if keys.token is None:
        raise RefusedError(
            403, "adapters cannot be changed over HTTP here: the server was started without a token", "forbidden"
        )
    if not (key := asking(request)).may_change:
        raise RefusedError(
            401,
            "changing adapters needs the header 'Authorization: Bearer TOKEN' with the server's token",
            "unauthorized",
            {"WWW-Authenticate": "Bearer"},
        )
    return key


def _equal(first: str, second: str) -> bool:
    """Whether texts are equal, in a time that does not tell where they differ."""
    return hmac.compare_digest(first.encode(errors="replace"), second.encode())
