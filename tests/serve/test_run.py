"""The process of a server: where it listens, what it logs."""

import logging
import resource
import socket
from pathlib import Path

import pytest

from dvora.serve.run import JsonLines, serve
from dvora.serve.server import Server
from dvora.serve.settings import Settings
from tests.recipes import tiny_models
from tests.serve.served import save_trained, serving


@pytest.mark.parametrize("host", ["", " ", "no host", "a..b", "127.0.0.1:80", "[::1]"])
def test_no_host(host: str, tmp_path: Path) -> None:
    """In particular no address at all, which the system takes for all networks."""
    with pytest.raises(ValueError, match=r"--host is .*expected"):
        serve(Settings(base="none", adapters=tmp_path), host, 0, 1, None)


@pytest.mark.parametrize("has_adapter", [False, True])
def test_a_language_model_is_refused(has_adapter: bool, tmp_path: Path) -> None:
    """Said by the base's own configuration, or by the adapters' task."""
    base, adapters = tiny_models.llama(tmp_path / "llama"), tmp_path / "adapters"
    adapters.mkdir()
    if has_adapter:
        save_trained(base, adapters / "a", 0, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=r"is a language model.*dvora-vllm \(docs/how-to/vllm.md\).*`dvora generate`"):
        Server(Settings(base=str(base), adapters=adapters))


@pytest.mark.parametrize(("task", "works"), [("SEQ_CLS", ("classify", "embed")), ("FEATURE_EXTRACTION", ("embed",))])
def test_a_decoder_classifies_and_embeds(task: str, works: tuple[str, ...], tmp_path: Path) -> None:
    base = tiny_models.llama(tmp_path / "llama")
    save_trained(base, tmp_path / "adapters" / "a", 0, task_type=task)
    with serving(base, tmp_path / "adapters") as (client, server):
        assert server.base.works == works
        status = {"/v1/classify": 200 if "classify" in works else 400, "/v1/embeddings": 200}
        for route, expected in status.items():
            answer = client.post(route, json={"model": "a", "input": ["a", "long text"]})
            assert answer.status_code == expected, answer.text
            assert ("cannot classify; it is served to embed" in answer.text) == (expected == 400)


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
