"""What a server counts, for Prometheus: labels are of the server's making, none grows with adapters or clients."""

from __future__ import annotations

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .scheduler import Batch

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, registry=self.registry)
        self._gauge = partial(Gauge, registry=self.registry)
        seconds = partial(Histogram, buckets=SECONDS, registry=self.registry)
        self._requests = counter("dvora_requests", "Requests that were answered.", ["route", "status"])
        self._latency = seconds("dvora_request_seconds", "From a request to its answer.", ["route"])
        self._batches = counter("dvora_batches", "Batches that ran.", ["kind"])
        self._rows = counter("dvora_batch_rows", "Rows of batches that ran.", ["kind"])
        self._compute = counter("dvora_batch_seconds", "Seconds in batches.", ["kind"])
        self._queued = seconds("dvora_queue_seconds", "From a request to its batch.")
        self._gauges: dict[str, Gauge] = {}
        self._adapters = self._gauge(
            "vllm:lora_requests_info",
            "Adapters of waiting requests (none runs between batches), and how many fit: what gateways route on.",
            ["running_lora_adapters", "waiting_lora_adapters", "max_lora"],
        )

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count an answer."""
        self._requests.labels(route, str(status)).inc()
        self._latency.labels(route).observe(seconds)

    def batch(self, batch: Batch, seconds: float, started: float) -> None:
        """Count a batch."""
        self._batches.labels(batch.kind).inc()
        self._rows.labels(batch.kind).inc(len(batch.requests))
        self._compute.labels(batch.kind).inc(seconds)
        for request in batch.requests:
            self._queued.observe(max(0.0, started - request.arrived))

    def text(self, values: dict[str, int], waiting: list[str], slots: int) -> bytes:
        """All metrics as Prometheus reads them: values of the moment, adapters that requests wait for, how many fit."""
        for name, value in values.items():
            if name not in self._gauges:
                self._gauges[name] = self._gauge(f"dvora_{name}", name.replace("_", " "))
            self._gauges[name].set(value)
        # One series, of this moment.
        self._adapters.clear()
        self._adapters.labels("", ",".join(waiting), str(slots)).set_to_current_time()
        return generate_latest(self.registry)
