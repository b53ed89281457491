"""Runs a function in several processes of one gloo group, and never leaves one behind."""

import queue
import socket
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from transcript.forks import FORKS

LIMIT = 120
"""Seconds after which all processes are killed; a collective gives up before."""


def run(worker: Callable[..., object], processes: int, *arguments: object) -> list[Any]:
    """What the worker returns on every rank, in the order of ranks.

    Args:
        worker: a function of a module, called with `arguments`.
        processes: how many.

    Raises:
        RuntimeError: a process failed or was still running after `LIMIT` seconds.
    """
    results = FORKS.Queue()
    port = _free_port()
    started = [
        FORKS.Process(target=_in_group, args=(worker, rank, processes, port, results, arguments), daemon=True)
        for rank in range(processes)
    ]
    for process in started:
        process.start()
    found: dict[int, Any] = {}
    try:
        end = time.monotonic() + LIMIT
        while len(found) < processes:
            rank, value, error = results.get(timeout=max(0.1, end - time.monotonic()))
            if error:
                raise RuntimeError(f"rank {rank}: {error}")
            found[rank] = value
    except queue.Empty:
        raise RuntimeError(f"only ranks {sorted(found)} of {processes} answered within {LIMIT} seconds") from None
    finally:
        for process in started:
            process.join(timeout=5 if len(found) == processes else 0)
            process.kill()
    return [found[rank] for rank in range(processes)]


class Sent(TorchDispatchMode):
    """Counts the collectives that run within it, by name; torch's own follows modules too, and stumbles."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            # It makes collectives of its parts, which come here by themselves.
            return NotImplemented
        if operation.namespace in ("c10d", "_c10d_functional"):
            self.operations[str(operation.overloadpacket)] += 1
        return operation(*args, **(kwargs or {}))


def refusal(action: Callable[[], object]) -> str:
    """What an action says when it is refused, "done" if it is not."""
    try:
        action()
    except ValueError as error:
        return str(error)
    return "done"


def _in_group(
    worker: Callable[..., object], rank: int, processes: int, port: int, results: Any, arguments: tuple[object, ...]
) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, processes, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes, timeout=timedelta(seconds=LIMIT / 2))
    try:
        results.put((rank, worker(*arguments), None))
    except Exception as error:
        results.put((rank, None, f"{type(error).__name__}: {error}"))
    finally:
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
    return port
