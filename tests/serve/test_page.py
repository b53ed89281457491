"""The pages in a browser: at / adapters are chosen, a text is sent, answers stand side by side; at /docs are routes."""

import hashlib
from pathlib import Path

import pytest

from tests.serve.served import Alone, Serving, copied, serving
from tests.tools.pages.seen import PHONE, WIDE, seen

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")


@pytest.mark.parametrize(("width", "scheme"), [(WIDE, "light"), (PHONE, "dark")])
def test_classes(bert: Path, classifiers: Path, tmp_path: Path, width: int, scheme: str) -> None:
    with (
        serving(bert, copied(classifiers, tmp_path / "adapters")) as (client, _),
        seen(str(client.base_url), width, scheme) as found,
    ):
        page = found.page
        page.wait_for_selector("#adapters button")
        page.fill("#search", "wo")
        page.click("#adapters >> text=two")
        page.fill("#text", "good movie")
        page.keyboard.press("Enter")
        page.wait_for_selector("article code >> nth=3")
        assert sorted(page.locator("article h2").all_inner_texts()) == ["five", "one", "three", "two"]
        two = page.locator("article", has_text="two").inner_text()
        probabilities = Alone(bert).logits(classifiers / "two", 2, "good movie").softmax(-1)
        assert f"{100 * probabilities.max():.1f} %" in two
        assert client.get("/v1/adapters/two").json()["digest"] in two
        assert found.width() <= width
        assert not found.complaints
        page.click("#adapters >> text=one")
        page.click("#ask")
        playwright.expect(page.locator("article")).to_have_count(3)
        page.fill("#text", "good " * 100)
        page.click("#ask")
        page.wait_for_selector(".error")
        assert "at most" in page.locator(".error").inner_text()


def test_a_key(critic: Path, trained: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(f'[shop]\nsha256 = "{hashlib.sha256(b"a secret").hexdigest()}"\nadapters = ["a1"]\n')
    with (
        serving(critic, copied(trained, tmp_path / "adapters"), keys=keys) as (client, _),
        seen(str(client.base_url)) as found,
    ):
        page = found.page
        page.wait_for_selector(".error")
        assert "one of the server's keys" in page.locator(".error").inner_text()
        page.fill("#key", "a secret")
        page.keyboard.press("Tab")
        page.wait_for_selector("#adapters button")
        assert page.locator("#adapters button").all_inner_texts() == ["a1"]
        page.fill("#text", "a")
        page.click("#ask")
        page.wait_for_selector("article code")
        assert page.evaluate("[document.cookie, localStorage.length, sessionStorage.length]") == ["", 0, 0]


def test_the_page_of_routes(critics: Serving) -> None:
    client, _ = critics
    answer = client.get("/docs")
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    with seen(f"{client.base_url}/docs", PHONE) as found:
        found.page.wait_for_selector("text=PUT /v1/adapters/{name}")
        text = found.page.inner_text("body")
        for path, methods in client.get("/openapi.json").json()["paths"].items():
            assert all(f"{method.upper()} {path}" in text for method in methods)
        assert found.width() <= PHONE
        assert all(line.startswith(f"asked for {client.base_url}") for line in found.complaints)
