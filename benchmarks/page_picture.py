"""The picture of the exported page: python -m benchmarks.page_picture, after `make web` has brought what it runs with.

Two adapters of MiniLM that were trained on different questions, and the page in a browser, light and dark.
"""

import csv
import io
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from benchmarks.exporting import BROWSER, VENDOR, run, served
from benchmarks.pictures import FOLDER
from materials.files import lay_out

NAME = "exported_page"
SIZE = {"width": 736, "height": 620}


def main() -> None:
    """Train, export, and take the pictures."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        lay_out(folder)
        with (folder / "reviews.csv").open(encoding="utf-8", newline="") as file:
            reviews = [(row["text"], row["label"]) for row in csv.DictReader(file)]
        lines = [line for line in (folder / "play.txt").read_text(encoding="utf-8").splitlines() if len(line) > 30]
        sources = [*((text, "a review") for text, _ in reviews[: len(lines)]), *((line, "a play") for line in lines)]
        for name, rows in (("film", reviews), ("source", sources)):
            with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([("text", "label"), *rows])
            how = ("--rank", "64", "--max-steps", "200", "--batch-size", "16", "--output", f"adapters/{name}")
            run(folder, "train", "--task", "text-classification", "--model", "minilm", "--data", f"{name}.csv", *how)
        run(folder, "export", "adapters", "--model", "minilm", "--to", "web", "--int8", "--output", "site")
        (folder / "site" / "vendor").symlink_to(VENDOR)
        with served(folder / "site") as address, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
            for scheme, ending in (("light", ""), ("dark", "-dark")):
                context = browser.new_context(viewport=SIZE, color_scheme=scheme, device_scale_factor=2)
                page = context.new_page()
                page.goto(f"{address}index.html")
                # The first run takes longer than those that follow.
                for name in ("film", "source", "film"):
                    page.click(f"[data-name={name}]")
                    page.wait_for_function(f"window.last?.adapter == '{name}'")
                taken = Image.open(io.BytesIO(page.screenshot()))
                taken.save(FOLDER / f"{NAME}{ending}.webp", quality=85, method=6)


if __name__ == "__main__":
    main()
