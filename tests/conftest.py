"""Settings of the whole suite."""

import gc
import os
import resource
import shutil
import signal
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import settings

import dvora
from transcript.forks import preload

LONG = {"benchmarks", "cli", "docs", "export", "hardening", "histories", "serve"}
"""Folders of files whose tests are few and long."""

# The doctor's new processes are forks of the same server.
preload()

# A shell that starts the tests in its background has Ctrl-C ignored, and commands that tests stop would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Sums over several threads depend on their number, and small tensors are faster on one.
torch.set_num_threads(1)

settings.register_profile("default", deadline=None, max_examples=30)
settings.register_profile("ci", deadline=None, max_examples=30, derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(autouse=True)
def no_default_projections() -> Iterator[None]:
    """Every test starts and ends without the process-wide default projections."""
    dvora.reset_shared_matrices()
    yield
    dvora.reset_shared_matrices()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """No test leaves more threads to those after it: with more of them than cores, each operation waits for the last.

    The whole suite took twice as long once.
    """
    yield
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert threads == 1


@pytest.fixture
def compiler() -> Iterator[None]:
    """An empty compile cache, and none of the warnings that the compiler gives about itself."""
    torch.compiler.reset()
    with warnings.catch_warnings():
        # Inductor's own imports and code paths use what PyTorch, Python and NumPy have deprecated.
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
    torch.compiler.reset()


@pytest.fixture
def inductor(compiler: None) -> None:
    """PyTorch's own backend, which writes C++ that includes Python's headers."""
    if shutil.which("g++") is None or not Path(sysconfig.get_path("include"), "Python.h").is_file():
        pytest.skip("g++ or Python's headers (python3-dev) are not installed")


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    """Threads that take turns after microseconds instead of milliseconds."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files go to processes in this order: the last ones should be short, or one process works long after the others.
    items.sort(key=lambda item: item.path.parent.name not in LONG)


def pytest_collection_finish() -> None:
    # What is imported by now lives on: every full collection of garbage would go through millions of its objects.
    gc.freeze()


def pytest_unconfigure() -> None:
    # Extensions count what is left at the end, and complain.
    gc.unfreeze()
    # Waited for, it and its forks are among the children whose time is counted.
    forkserver._forkserver._stop()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    minutes = sum(each.ru_utime + each.ru_stime for each in used) / 60
    terminalreporter.write_line(f"{minutes:.1f} processor minutes, of all processes that have ended")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz", action="store_true", help="run the randomised tests at their full length")
