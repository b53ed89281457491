"""The exported page in a real browser; under `make web`, which installs what it runs with from npm."""

import functools
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dvora.recipes.adapters.exporting import export
from tests.export.test_onnx import logits_of
from tests.serve.served import save_classifier
from tests.tools.pages.seen import PHONE, WIDE, Seen, seen

PACKAGES = Path(__file__).parents[2] / ".web" / "node_modules"
pytestmark = pytest.mark.skipif(not PACKAGES.is_dir(), reason="make web has it")
NAMES = [f"tenant-{number:02}" for number in range(20)]
TEXT = "the book was very good"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def site(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty adapters, with the names of their classes."""
    folder = tmp_path_factory.mktemp("site")
    for number, name in enumerate(NAMES):
        run = folder / "adapters" / name
        save_classifier(bert, run / "adapter", number, 3)
        (run / "run.json").write_text('{"labels": ["bad", "so <b>so</b>", "good"]}')
    export(folder / "adapters", folder / "site", "web", str(bert))
    (folder / "site" / "node_modules").symlink_to(PACKAGES)
    return folder / "site"


@contextmanager
def opened(site: Path, width: int = WIDE, scheme: str = "light") -> Iterator[tuple[Seen, str]]:
    """The page, and the address of its folder."""
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        try:
            with seen(f"{address}index.html", width, scheme) as found:
                found.page.wait_for_function("window.last || document.querySelector('.error')")
                yield found, address
        finally:
            server.shutdown()


@pytest.mark.parametrize(("width", "scheme"), [(WIDE, "light"), (PHONE, "dark")])
def test_adapters_switch(site: Path, bert: Path, width: int, scheme: str) -> None:
    with opened(site, width, scheme) as (found, address):
        page = found.page
        page.fill("#text", TEXT)
        for name in (*NAMES, NAMES[0]):
            page.click(f"[data-name={name}]")
            page.wait_for_function(f"window.last.adapter == '{name}'")
            # What was typed last is answered in the end.
            page.wait_for_timeout(20)
            expected = logits_of(bert, site.parent / "adapters" / name / "adapter", [TEXT])[0]
            np.testing.assert_allclose(page.evaluate("window.last.logits"), expected, atol=1e-4)
        assert "so <b>so</b>" in page.locator("#classes").inner_text()
        assert found.width() <= width
        # Each was fetched once, when it was first chosen, and nothing from elsewhere.
        asked = [line.removeprefix("asked for ") for line in found.complaints]
        assert all(line.startswith(address) for line in asked)
        assert sum("/adapters/tenant" in line for line in asked) == len(NAMES)


def test_what_is_refused(site: Path, tmp_path: Path) -> None:
    file = site / "adapters" / f"{NAMES[3]}.safetensors"
    content = file.read_bytes()
    layout = json.loads((site / "layout.json").read_text())
    with opened(site) as (found, _):
        for age, (damaged, message) in enumerate(
            (
                (content[:-4], "truncated"),
                (b"\x00" * 20, "damaged"),
                (content.replace(layout["digest"].encode(), b"0" * 32), "another base"),
            )
        ):
            file.write_bytes(damaged)
            # The server tells files apart by whole seconds.
            os.utime(file, (age, age))
            found.page.click(f"[data-name={NAMES[3]}]")
            found.page.wait_for_function(f"document.querySelector('#state').textContent.includes('{message}')")
        file.write_bytes(content)
        found.page.click(f"[data-name={NAMES[3]}]")
        found.page.wait_for_function(f"window.last.adapter == '{NAMES[3]}'")


def test_without_web_assembly(site: Path, tmp_path: Path) -> None:
    page = tmp_path / "site"
    page.mkdir()
    for path in site.iterdir():
        (page / path.name).symlink_to(path)
    (page / "index.html").unlink()
    (page / "index.html").write_text(
        (site / "index.html").read_text().replace("<head>", "<head><script>delete WebAssembly</script>")
    )
    with opened(page) as (found, _):
        assert "has no WebAssembly" in found.page.locator(".error").inner_text()


def test_another_version_of_the_format(site: Path, tmp_path: Path) -> None:
    page = tmp_path / "site"
    page.mkdir()
    for path in site.iterdir():
        (page / path.name).symlink_to(path)
    (page / "layout.json").unlink()
    (page / "layout.json").write_text((site / "layout.json").read_text().replace('"version": 1', '"version": 2'))
    with opened(page) as (found, _):
        assert "export the model again" in found.page.locator(".error").inner_text()
