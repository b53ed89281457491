"""A running server without HTTP: one base, its adapters, and the threads that read, change and compute."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from math import prod

from ..recipes.models.bases import longest_text
from .access import Keys
from .base import open_base
from .engine import Engine
from .metrics import Metrics
from .registry import Registry
from .settings import Settings
from .store import Served, Store
from .texts import Texts, Turns

_log = logging.getLogger("dvora.serve")


class Server:
    """One base, its adapters and its engine.

    Args:
        settings: how it is set up.
        is_shared: whether other servers have the same adapters, which change for all of them.

    Raises:
        ValueError: the base or an adapter cannot be served; the message names it.
    """

    def __init__(self, settings: Settings, is_shared: bool = False) -> None:
        self.settings, self.metrics = settings, Metrics()
        self.keys = Keys(settings.token, settings.keys)
        self.store = Store(settings.adapters, is_shared)
        try:
            opened, damaged = self.store.open()
            settings = self.settings = _with_room_for(opened, settings)
            self.base = open_base(settings, opened, damaged)
            self.registry = Registry(self.base, self.store, opened, damaged)
            readable = longest_text(self.base.tokenizer, self.base.model.config.get_text_config())
            self.longest = min(settings.max_length or readable, readable)
            self.texts = Texts(self.base, self.longest)
            self.changes = Turns("dvora-changes")
            self.engine = Engine(self.base, settings, self.metrics)
        except BaseException:
            self.store.close()
            raise

    def close(self, seconds: float = 30.0) -> None:
        """Answer what has been taken, for some seconds, and free everything."""
        self.changes.close()
        self.engine.close(seconds)
        self.texts.close()
        self.base.bank.close()
        self.store.close()

    async def follow(self) -> None:
        """Serve what servers that share the adapters have changed; 503, if it cannot be read here."""
        if self.store.is_stale:
            await asyncio.to_thread(self.registry.follow)

    @asynccontextmanager
    async def versions(self, names: Iterable[str | None]) -> AsyncIterator[dict[str | None, Served | None]]:
        """Hold the adapters that answer now under these names.

        An adapter that was never used is read beside the engine, so that no batch waits for a disk.
        """
        distinct = dict.fromkeys(names)
        for name in distinct:
            if (version := self.registry.version(name)) is not None and version.digest is None:
                await asyncio.to_thread(self.registry.read, name)
        with ExitStack() as held:
            yield {name: held.enter_context(self.registry.using(name)) for name in distinct}

    def metrics_text(self) -> bytes:
        """What Prometheus reads."""
        stats, requests = self.base.bank.stats(), self.engine.waiting()
        waiting = sorted({request.version.name for request in requests if request.version})
        values = {name: getattr(stats, name) for name in ("adapters", "slots", "slots_filled", "host_bytes")}
        values |= {"queue_size": len(requests), "slot_bytes": stats.device_bytes}
        values |= {f"adapter_{name}": getattr(stats, name) for name in ("loads", "reads", "evictions")}
        return self.metrics.text(values, waiting, stats.slots)


def _with_room_for(opened: Sequence[Served], settings: Settings) -> Settings:
    """The settings with fewer slots, if the head memory divided by them would be too little for an adapter."""
    sizes = {version.name: 0 for version in opened}
    for version in opened:
        # One that cannot be read is left out later, with the reason.
        with suppress(ValueError, TypeError, OSError):
            content = version.source.content
            heads = sum(prod(part.shape) for part in content.whole)
            sizes[version.name] = 4 * (heads + sum(layer.size for layer in content.factors))
    largest = max(sizes, key=sizes.__getitem__, default="")
    slots = int(settings.head_memory * 2**30) // max(1, sizes.get(largest, 0))
    if not 0 < slots < settings.slots:
        return settings
    _log.warning(
        "%s slots, not %s: the head and factors of %s take %s bytes; more --head-memory gives more slots",
        slots, settings.slots, largest, f"{sizes[largest]:,}",
    )  # fmt: skip
    return settings.model_copy(update={"slots": slots})
