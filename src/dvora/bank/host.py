"""The host tier of a bank: factor rows on the CPU up to a number of bytes, least recently used out first."""

from __future__ import annotations

import threading
from collections import OrderedDict

from .factors import Factors


class HostTier:
    """Rows by digest, safe under threads.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = 0
        self._lock = threading.Lock()
        self._rows: OrderedDict[str, Factors] = OrderedDict()

    def get(self, digest: str) -> Factors | None:
        """The rows of an adapter, if they are here; it is then the most recently used."""
        with self._lock:
            if digest in self._rows:
                self._rows.move_to_end(digest)
            return self._rows.get(digest)

    def put(self, digest: str, factors: Factors) -> None:
        """Keep the rows of an adapter, in the place of others."""
        with self._lock:
            if digest in self._rows:
                return
            while self._rows and self.nbytes + factors.nbytes > self.limit:
                self.nbytes -= self._rows.popitem(last=False)[1].nbytes
            # One statement, which no interruption divides.
            self._rows[digest], self.nbytes = factors, self.nbytes + factors.nbytes

    def remove(self, digest: str) -> None:
        """Forget an adapter, if it is here."""
        with self._lock:
            if digest in self._rows:
                self.nbytes -= self._rows.pop(digest).nbytes

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, digest: object) -> bool:
        return digest in self._rows
