"""The process of a server: where it listens, what it logs."""

import logging
import resource
import socket
from pathlib import Path

import pytest

from dvora.serve.run import JsonLines, serve
from dvora.serve.settings import Settings


@pytest.mark.parametrize("host", ["", " ", "no host", "a..b", "127.0.0.1:80", "[::1]"])
def test_no_host(host: str, tmp_path: Path) -> None:
    """In particular no address at all, which the system takes for all networks."""
    with pytest.raises(ValueError, match=r"--host is .*expected"):
        serve(Settings(base="none", adapters=tmp_path), host, 0, 1, None)


def test_records_are_lines() -> None:
    content = {"adapter": 'a"\n\u2028\x1b\ud800'}
    record = logging.LogRecord("dvora.serve", logging.INFO, "", 0, content, None, None)
    assert JsonLines().format(record).isprintable()
    assert JsonLines().format(record).isascii()


def test_more_connections_than_files(tmp_path: Path) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        pytest.skip("the system lets a process open any number of files")
    with pytest.raises(ValueError, match=rf"--connections is {hard:,}.*ulimit"):
        serve(Settings(base="none", adapters=tmp_path), "127.0.0.1", 0, hard, None)


def test_a_busy_port_is_a_sentence(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port {port} of 127.0.0.1 is in use; take another, or 0"):
            serve(Settings(base="base", adapters=tmp_path), "127.0.0.1", port, 8, None)
