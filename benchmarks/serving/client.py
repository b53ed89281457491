"""Clients of a server: each sends its next request when it has an answer, for adapters drawn by Zipf's law."""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2 as httpx
import numpy as np

SENTENCES = (
    "a fine, funny and touching film",
    "the actors do what they can with a script that does nothing",
    "two hours",
    "it starts slowly, finds its feet in the second act and ends better than anyone had a right to expect of it",
)


@dataclass
class Measured:
    """What clients saw.

    Args:
        seconds: from a request to its answer.
        first: to the first token, where texts are generated.
        each: seconds a token after the first one.
        elapsed: of all.
        errors: answers that were none.
    """

    seconds: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    each: list[float] = field(default_factory=list)
    elapsed: float = 0.0
    errors: int = 0

    def add(self, other: "Measured") -> None:
        """Take another part's numbers."""
        self.seconds += other.seconds
        self.first += other.first
        self.each += other.each
        self.elapsed += other.elapsed
        self.errors += other.errors

    def row(self) -> dict[str, Any]:
        """Requests a second, and percentiles in milliseconds."""
        values: dict[str, Any] = {
            "requests": len(self.seconds),
            "errors": self.errors,
            "requests_per_second": round(len(self.seconds) / self.elapsed, 2),
        }
        for name, seconds in (("answer", self.seconds), ("first_token", self.first), ("token", self.each)):
            if seconds:
                values |= {
                    f"{name}_ms_p{percent}": round(1000 * float(np.percentile(seconds, percent)), 2)
                    for percent in (50, 95, 99)
                }
        return values


def ask(requests: Sequence[tuple[str, str]], clients: int, tokens: int = 0, seed: int = 0) -> Measured:
    """Send requests, so many at a time.

    Args:
        requests: for each the server's address and the model that it names.
        clients: how many requests are under way.
        tokens: to generate; 0 classifies.
        seed: of the texts.
    """
    return asyncio.run(_ask(requests, clients, tokens, seed))


async def _ask(requests: Sequence[tuple[str, str]], clients: int, tokens: int, seed: int) -> Measured:
    measured, coming = Measured(), iter(enumerate(requests))
    async with httpx.AsyncClient(timeout=120) as client:

        async def work() -> None:
            for number, (address, model) in coming:
                text = SENTENCES[(number + seed) % len(SENTENCES)]
                started = time.perf_counter()
                try:
                    if tokens:
                        await _generate(client, address, model, text, tokens, measured, started)
                    else:
                        await _classify(client, address, model, text, measured, started)
                except (httpx.HTTPError, KeyError):
                    measured.errors += 1

        started = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(clients)))
        measured.elapsed = time.perf_counter() - started
    return measured


async def _classify(
    client: httpx.AsyncClient, address: str, model: str, text: str, measured: Measured, started: float
) -> None:
    answer = await client.post(f"{address}/v1/classify", json={"model": model, "input": text})
    answer.raise_for_status()
    measured.seconds.append(time.perf_counter() - started)


async def _generate(
    client: httpx.AsyncClient, address: str, model: str, text: str, tokens: int, measured: Measured, started: float
) -> None:
    body = {"model": model, "prompt": text, "max_tokens": tokens, "temperature": 0, "stream": True}
    moments, options = [], {"stream_options": {"include_usage": True}}
    async with client.stream("POST", f"{address}/v1/completions", json={**body, **options}) as stream:
        stream.raise_for_status()
        count = 0
        async for line in stream.aiter_lines():
            if line.startswith("data: {"):
                moments.append(time.perf_counter())
                count = (json.loads(line[6:]).get("usage") or {}).get("completion_tokens", count)
    measured.seconds.append(time.perf_counter() - started)
    measured.first.append(moments[0] - started)
    if count > 1:
        measured.each.append((moments[-1] - moments[0]) / (count - 1))
