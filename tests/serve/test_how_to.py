"""Every command and program on the page about serving runs as it stands there, on tiny models of the same names."""

import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest

import dvora
from dvora.serve.access import Keys
from tests.serve.served import copied

PAGE = Path(dvora.__file__).parents[2] / "docs" / "how-to" / "serve.md"
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_page(bert: Path, classifiers: Path, tmp_path: Path) -> None:
    copied(bert, tmp_path / "minilm")
    for name, outputs in (("films", "two"), ("shop", "three")):
        copied(classifiers / outputs, tmp_path / "customers" / name)
    copied(classifiers / "five", tmp_path / "new")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "DVORA_SERVE_TOKEN": "a-long-secret"}
    servers: list[subprocess.Popen[bytes]] = []
    outputs_of = []
    try:
        for kind, block in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
            if "pip install" in block:
                continue
            if "dvora serve" in block:
                command = ["bash", "-c", f"exec {block.splitlines()[-1]}"]
                servers.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL))
                wait_for(f"http://localhost:{8000 + len(servers) - 1}/readyz")
                continue
            # curl ends well whatever the server answers, unless --fail is given.
            script = block.replace("curl ", "curl -sS --fail-with-body ")
            command = ["bash", "-ec", script] if kind == "sh" else [sys.executable, "-c", block]
            ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
            assert ended.returncode == 0, (block, ended.stdout, ended.stderr)
            outputs_of.append(ended.stdout)
    finally:
        for server in servers:
            server.kill()
            server.wait()
    assert '"digest"' in outputs_of[0]
    assert outputs_of[1].count('"probs"') == 2
    assert "score=" in outputs_of[2]
    assert len(outputs_of) == 5


def test_the_keys_on_the_page(tmp_path: Path) -> None:
    (block,) = re.findall(r"^```toml\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (tmp_path / "keys.toml").write_text(block)
    assert Keys(file=tmp_path / "keys.toml").may_change


def wait_for(address: str) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        with suppress(OSError):
            urllib.request.urlopen(address)
            return
        time.sleep(0.1)
    raise AssertionError(f"nothing answers at {address}")
