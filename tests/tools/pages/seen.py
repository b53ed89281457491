"""Pages as a real browser shows them."""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDE, PHONE = 1600, 390


@dataclass
class Seen:
    """A page in a browser.

    Args:
        page: of playwright.
        complaints: what the console said, and what could not be loaded.
    """

    page: Any
    complaints: list[str] = field(default_factory=list)

    def width(self) -> int:
        """Of everything on it."""
        found: int = self.page.evaluate("document.documentElement.scrollWidth")
        return found

    def colour(self, selector: str, what: str = "color") -> tuple[int, ...]:
        """Red, green and blue of an element."""
        style = self.page.eval_on_selector(selector, f"each => getComputedStyle(each)['{what}']")
        return tuple(int(float(part)) for part in style[style.index("(") + 1 : style.index(")")].split(",")[:3])


@contextlib.contextmanager
def seen(
    file: Path | str, width: int = WIDE, scheme: str = "light", root: Path | None = None, args: Sequence[str] = ()
) -> Iterator[Seen]:
    """A file in headless Chromium, which may load nothing but the file, or the files of a site; or a server's page.

    Args:
        file: a page, or its address.
        width: of the window, in pixels.
        scheme: light or dark.
        root: of the site; None: the page is all there is.
        args: more of the browser's.
    """
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip(f"no browser is installed ({', '.join(PROGRAMS)})")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", *args])
        try:
            context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
            found = Seen(context.new_page())
            found.page.on("console", lambda message: found.complaints.append(message.text))
            found.page.on("pageerror", lambda error: found.complaints.append(str(error)))
            address = file if isinstance(file, str) else file.as_uri()
            allowed = address if root is None else root.as_uri()
            found.page.on("request", lambda asked: _note(found, asked.url, allowed))
            found.page.goto(address)
            yield found
        finally:
            browser.close()


def _note(found: Seen, url: str, allowed: str) -> None:
    if not url.startswith((allowed, "data:")):
        found.complaints.append(f"asked for {url}")
