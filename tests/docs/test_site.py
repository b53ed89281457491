"""The documentation's site, as built and as browsers show it: its links, its search, its pictures, its copy buttons."""

import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

from dvora.recipes.settings import Settings
from tests.cli.program import run
from tests.tools.pages.seen import PHONE, Seen, seen

ROOT = Path(__file__).parent.parent.parent
WIDE = 1280
LINK = re.compile(r'<(?:a|img|script|link)[^>]*? (?:href|src)="([^"]+)"')
ID = re.compile(r' id="([^"]+)"')


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a warning of its making is an error."""
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (built.returncode, built.stderr) == (0, "")
    return folder


def pages(site: Path) -> list[Path]:
    return sorted(set(site.rglob("*.html")) - {site / "404.html"})


def test_every_link_leads_somewhere(site: Path) -> None:
    texts = {page: page.read_text(encoding="utf-8") for page in pages(site)}
    broken = []
    for page, text in texts.items():
        for link in LINK.findall(text):
            path, _, anchor = unquote(link.split("?")[0]).partition("#")
            if re.match(r"\w+:", link):
                continue
            target = (page.parent / path).resolve() if path else page
            if not target.exists() or (anchor and target in texts and anchor not in ID.findall(texts[target])):
                broken.append(f"{page.relative_to(site)}: {link}")
    # "Back to top" and the like have no element, and pictures say for which pages they are.
    assert [each for each in broken if not each.endswith(("#__top", "#only-light", "#only-dark", ": ."))] == []


def test_the_page_of_commands_has_every_command_and_every_setting(site: Path) -> None:
    text = (site / "command-line.html").read_text(encoding="utf-8")
    assert all(f"<code>{key}</code>" in text for key in Settings.model_fields)
    names = re.findall(r"^\W+([a-z]+) +[A-Z]", run("dvora --help").stdout.partition("Commands")[2], flags=re.MULTILINE)
    assert "train" in names
    assert all(f'id="dvora-{name}"' in text for name in names)


@pytest.mark.parametrize(("width", "scheme"), [(WIDE, "light"), (PHONE, "dark")])
def test_every_page_reads_well_in_a_browser(site: Path, width: int, scheme: str) -> None:
    with seen(site / "index.html", width, scheme, root=site) as found:
        for page in pages(site):
            # Whatever is too wide is so on a phone, and pictures are what differs on a light page.
            if width == WIDE and "pictures/" not in page.read_text():
                continue
            found.page.goto(page.as_uri())
            assert (page, found.width()) == (page, width)
            assert (page, sum(found.colour("body", "backgroundColor")) > 600) == (page, scheme == "light")
            assert (page, *shown_pictures(found)) == (
                page,
                {scheme} if "pictures/" in page.read_text() else set(),
                True,
            )
            assert (page, formulas_left(found)) == (page, 0)
            assert (page, found.complaints) == (page, [])


def formulas_left(found: Seen) -> int:
    """How many formulas are not typeset, or not understood."""
    left = "document.querySelectorAll('.arithmatex:not(:has(.katex)), .katex-error').length"
    return int(found.page.evaluate(left))


def shown_pictures(found: Seen) -> tuple[set[str], bool]:
    """For which pages the pictures are that are shown, and whether they were loaded."""
    sources = found.page.eval_on_selector_all(
        "img[src*='pictures/']", "all => all.filter(each => each.checkVisibility()).map(each => each.src)"
    )
    loaded = found.page.evaluate("[...document.images].every(each => each.complete && each.naturalWidth > 0)")
    return {source.rpartition("#only-")[2] for source in sources}, loaded


def test_search_finds_a_method_of_the_model_without_a_server(site: Path) -> None:
    with seen(site / "index.html", root=site) as found:
        # As a link: what is typed before the index is there is lost.
        found.page.goto(f"{found.page.url}?q=set_strength")
        first = found.page.wait_for_selector(".md-search-result__item a")
        assert "reference/models.html" in first.get_attribute("href")
        assert found.complaints == []


def test_the_copy_button_copies_the_command_alone(site: Path) -> None:
    with seen(site / "get-started.html", WIDE, root=site) as found:
        found.page.evaluate("document.addEventListener('copy', event => { window.copied = event.target.value })")
        block = found.page.locator(".highlight", has_text="$ dvora count").first
        assert "counts" in block.inner_text()
        block.hover()
        block.locator("[data-clipboard-target], [data-md-type=copy]").first.click()
        assert found.page.evaluate("window.copied") == "dvora count minilm --task-type SEQ_CLS"


def test_a_wide_table_scrolls_in_itself(site: Path) -> None:
    with seen(site / "results.html", PHONE, root=site) as found:
        wider = "all => all.some(each => each.scrollWidth > each.clientWidth)"
        assert found.page.eval_on_selector_all(".md-typeset__scrollwrap", wider)
