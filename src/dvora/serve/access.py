"""Who asks, by the keys of tenants, and what they may see and change.

Every route that answers with anything of an adapter has a dependency from here.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import sys
import time
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import ceil
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, Request
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from ..recipes.files import read_small
from ..text import did_you_mean
from .requests import RefusedError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BASE = "base"
"""In patterns, headers and answers, in place of an adapter: the base alone. No adapter has this name."""
SHORTEST_TOKEN, LARGEST_FILE = 8, 2**24
"""Characters of a secret, the token or a key, without which it opens nothing; and bytes."""
_MAKE_KEY = "dvora serve --new-key NAME"


class Tenant(BaseModel):
    """A table of the file of keys, by the tenant's name."""

    model_config = ConfigDict(extra="forbid", strict=True)
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$", description="the hash of the tenant's key")]
    adapters: Annotated[list[str], Field(min_length=1)]
    change: bool = False
    requests: PositiveInt | None = None
    tokens: PositiveInt | None = None


class Allowance:
    """So many of something a minute, or any number, which come back evenly. What is overdrawn is paid back first."""

    def __init__(self, rate: int | None = None) -> None:
        self.rate = rate
        self._left, self._since = float(rate or 0), time.monotonic()

    def take(self, count: int) -> None:
        """Use some."""
        self.seconds(0)
        self._left -= count

    def seconds(self, count: int) -> float:
        """After which there are so many."""
        if self.rate is None:
            return 0.0
        now = time.monotonic()
        self._left = min(self.rate, self._left + (now - self._since) * self.rate / 60)
        self._since = now
        return max(0.0, (count - self._left) * 60 / self.rate)


@dataclass(frozen=True)
class Key:
    """What a client may do."""

    tenant: str | None = None
    """Whose it is; None: of the server's token, or of everybody where there are no keys."""
    names: tuple[str, ...] = ("*",)
    """Patterns of the adapters that it sees, as in a shell; of others it does not learn that they exist."""
    may_change: bool = False
    requests: Allowance = field(default_factory=Allowance)
    tokens: Allowance = field(default_factory=Allowance)

    def sees(self, name: str | None) -> bool:
        """Whether an adapter exists for it; None is the base."""
        return any(fnmatchcase(BASE if name is None else name, pattern) for pattern in self.names)

    @property
    def sees_all(self) -> bool:
        """Whether nothing is hidden from it."""
        return "*" in self.names

    def queue_of(self, name: str | None) -> str:
        """In which queue its requests wait: its own, or without a tenant that of the adapter."""
        return f"{BASE if name is None else name}:" if self.tenant is None else self.tenant

    def admit(self) -> None:
        """Count a request; 429, if the tenant's minute is used up."""
        for what, allowance, needed in (("requests", self.requests, 1), ("tokens", self.tokens, 0)):
            if seconds := ceil(allowance.seconds(needed)):
                message = f"{allowance.rate:,} {what} a minute may be had with this key; try again in {seconds} seconds"
                raise RefusedError(429, message, "rate_limit_exceeded", {"Retry-After": str(seconds)})
        self.requests.take(1)

    def check_changes(self, name: str) -> None:
        """Refuse, with 403, to change an adapter that the key is not for, whether it exists or not."""
        if not self.sees(name):
            raise RefusedError(403, f"this key changes adapters of other names than {name[:200]!r}", "forbidden")


class Keys:
    """All keys of a server.

    Args:
        token: of whoever may change all adapters; None: nobody has one.
        file: of the tenants' keys, without which nothing is answered then; None: everybody may ask.

    Raises:
        ValueError: the token is too short, not ASCII or a tenant's key, or the file is damaged.
        OSError: the file cannot be read.
    """

    def __init__(self, token: str | None = None, file: Path | None = None) -> None:
        self._everybody = Key() if file is None else None
        self._keys = {} if file is None else _read(file)
        if token is not None:
            if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable():
                raise ValueError(
                    f"the token must have {SHORTEST_TOKEN} or more letters of ASCII, such as those of "
                    f"`openssl rand -hex 16`; it has {len(token)}, and others are sent in several encodings"
                )
            digest = _hash(token.encode())
            if (key := self._keys.get(digest)) is not None:
                raise ValueError(
                    f"--keys {file}: the key of {key.tenant!r} is the server's token, which sees and changes all "
                    f"adapters; give the tenant another key: {_MAKE_KEY}"
                )
            self._keys[digest] = Key(may_change=True)
        self.may_change = any(key.may_change for key in self._keys.values())

    def key_of(self, authorization: bytes) -> Key:
        """The key in a request's header; 401, if it has none, and there are keys."""
        scheme, _, secret = authorization.partition(b" ")
        is_secret = scheme.lower() == b"bearer" and len(secret := secret.strip()) >= SHORTEST_TOKEN
        # Compared by their hashes, which take a time that says nothing of the secret.
        if (key := self._keys.get(_hash(secret) if is_secret else "", self._everybody)) is None:
            raise _unauthorized("asking needs the header 'Authorization: Bearer KEY' with one of the server's keys")
        return key


async def asking(request: Request) -> Key:
    """The key of a request that asks, counted in its minute: 401 without one, 429 when that is used up."""
    keys: Keys = request.app.state.server.keys
    headers: list[bytes] = [value for name, value in request.headers.raw if name == b"authorization"]
    key = keys.key_of(headers[0] if len(headers) == 1 else b"")
    key.admit()
    return key


Asking = Annotated[Key, Depends(asking)]


async def changing(request: Request, key: Asking) -> Key:
    """The key of a request that changes adapters: 403, if nobody may, or a tenant may not; 401 without one."""
    if not request.app.state.server.keys.may_change:
        raise RefusedError(
            403, "adapters cannot be changed over HTTP here: the server was started without a token", "forbidden"
        )
    if key.may_change:
        return key
    if key.tenant is not None:
        raise RefusedError(403, "this key may ask, and change nothing", "forbidden")
    raise _unauthorized("changing adapters needs the header 'Authorization: Bearer TOKEN' with the server's token")


def _hash(secret: bytes) -> str:
    return hashlib.sha256(secret).hexdigest()


def _unauthorized(message: str) -> RefusedError:
    return RefusedError(401, message, "unauthorized", {"WWW-Authenticate": "Bearer"})


def new_key(tenant: str) -> tuple[str, str]:
    """A new key, and a tenant's table with its hash, for the file of keys."""
    secret = secrets.token_hex(24)
    table = f'[{json.dumps(tenant)}]\nsha256 = "{_hash(secret.encode())}"\nadapters = [{json.dumps(f"{tenant}-*")}]\n'
    return secret, table


def _tenant(where: str, table: Any) -> Tenant:
    """A table as it should be. No error says what stands in it, which may be a key."""
    if not isinstance(table, dict):
        raise ValueError(f"{where} stands outside of a table; write [NAME] above it, the tenant's name")
    if unknown := table.keys() - Tenant.model_fields:
        raise ValueError(f"{where}: unknown key {min(unknown)!r}, {did_you_mean(min(unknown), Tenant.model_fields)}")
    try:
        return Tenant.model_validate(table)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        if first["loc"] == ("sha256",):
            what = "missing" if first["type"] == "missing" else "no hash of a key"
            raise ValueError(
                f"{where}: sha256 is {what}; expected its 64 digits and letters a to f: {_MAKE_KEY} makes both"
            ) from None
        raise ValueError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _read(file: Path) -> dict[str, Key]:
    """The keys of a file, by the hashes of their secrets."""
    try:
        tables = tomllib.loads(read_small(file, LARGEST_FILE))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"--keys {file}: {error}") from None
    tenants = {name: _tenant(f"--keys {file}: {name}", table) for name, table in tables.items()}
    if unset := [name for name, one in tenants.items() if one.sha256 == _hash(b"")]:
        raise ValueError(
            f"--keys {file}: {unset[0]}.sha256 is the hash of an empty text, expected that of a secret; make one: "
            f"{_MAKE_KEY}"
        )
    keys = {
        one.sha256: Key(name, tuple(one.adapters), one.change, Allowance(one.requests), Allowance(one.tokens))
        for name, one in tenants.items()
    }
    if len(keys) < len(tenants):
        raise ValueError(f"--keys {file}: two tenants have the same key; give each its own")
    return keys
