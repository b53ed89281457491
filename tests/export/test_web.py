"""The exported page in a real browser, and its module in Node; under `make web`, which has what they run with."""

import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModel, AutoTokenizer

import dvora
from benchmarks.exporting import PACKAGES, VENDOR, served
from dvora.recipes.adapters.exporting import export
from tests.export.test_onnx import logits_of, packed_digest
from tests.recipes import tiny_models
from tests.serve.served import Alone, save_classifier, save_trained
from tests.tools.pages.seen import PHONE, WIDE, Seen, seen

pytestmark = pytest.mark.skipif(not VENDOR.is_dir(), reason="make web has it")
NAMES = [f"tenant-{number:02}" for number in range(20)]
TEXT = "the book was very good"
PAGE = Path(dvora.__file__).parents[2] / "docs" / "how-to" / "export.md"


@pytest.fixture(scope="module")
def site(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty adapters, with the names of their classes."""
    folder = tmp_path_factory.mktemp("site")
    for number, name in enumerate(NAMES):
        run = folder / "adapters" / name
        save_classifier(bert, run / "adapter", number, 3)
        (run / "run.json").write_text('{"labels": ["bad", "so <b>so</b>", "good"]}')
    export(folder / "adapters", folder / "site", "web", str(bert), int8=True)
    return with_packages(folder / "site")


def with_packages(site: Path) -> Path:
    (site / "node_modules").symlink_to(PACKAGES)
    (site / "vendor").symlink_to(VENDOR)
    return site


def linked(site: Path, folder: Path) -> Path:
    """A copy of a site, whose files may be replaced after `unlink`."""
    (folder / "adapters").mkdir(parents=True)
    for path in (*site.iterdir(), *(site / "adapters").iterdir()):
        if path.name != "adapters":
            (folder / path.relative_to(site)).symlink_to(path)
    return folder


def replaced(file: Path, content: bytes) -> None:
    file.unlink()
    file.write_bytes(content)


ANSWERED = "window.last || document.querySelector('.error:not(:empty)')"


@contextmanager
def opened(
    site: Path,
    width: int = WIDE,
    scheme: str = "light",
    headers: Mapping[str, str] = MappingProxyType({}),
    args: Sequence[str] = (),
) -> Iterator[tuple[Seen, str]]:
    """The page, and the address of its folder."""
    with served(site, headers) as address, seen(f"{address}index.html", width, scheme, args=args) as found:
        found.page.wait_for_function(ANSWERED)
        yield found, address


def error_of(page: Any) -> str:
    """What the page says is wrong."""
    (found,) = page.locator(".error:not(:empty)").all()
    text: str = found.inner_text()
    return text


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
        asked = [line.removeprefix("asked for ") for line in found.complaints if line.startswith("asked for ")]
        assert all(line.startswith(address) for line in asked)
        assert sum("/adapters/tenant" in line for line in asked) == len(NAMES)


def test_what_is_refused(site: Path, tmp_path: Path) -> None:
    """The classes on show stay those of the button that is pressed, and the error is beside the buttons."""
    layout = json.loads((site / "layout.json").read_text())
    content = (site / "adapters" / f"{NAMES[3]}.safetensors").read_bytes()
    values = np.frombuffer(content[-4 * layout["size"] :], np.float32).copy()
    labels, others = ["bad", "so <b>so</b>", "good"], ["good", "so <b>so</b>", "bad"]
    was, swapped = (json.dumps(json.dumps(each))[1:-1].encode() for each in (labels, others))
    start, of_others = content[: -values.nbytes], content.replace(was, swapped)
    digest, other = (packed_digest(layout, NAMES[3], each, values.tobytes()).encode() for each in (labels, others))
    values[0] = np.inf
    infinite = start.replace(digest, packed_digest(layout, NAMES[3], labels, values.tobytes()).encode())
    site = linked(site, tmp_path / "site")
    file = site / "adapters" / f"{NAMES[3]}.safetensors"
    with opened(site) as (found, _):
        classes = found.page.locator("#classes").inner_text()
        for age, (damaged, message) in enumerate(
            (
                (content[:-4], "truncated"),
                (b"\x00" * 20, "damaged"),
                (content.replace(layout["digest"].encode(), b"0" * 32), "another base"),
                (content[:-1] + bytes([content[-1] ^ 1]), "another digest"),
                (start + values.tobytes(), "another digest"),
                (infinite + values.tobytes(), "not finite"),
                (content.replace(b'"version":"2"', b'"version":"3"'), "expected dvora-packed 2"),
                ((site / "adapters" / f"{NAMES[4]}.safetensors").read_bytes(), f"is another one, {NAMES[4]}"),
                (of_others, "another digest"),
                (of_others.replace(digest, other), "another one than adapters/index.json"),
                (content.replace(was, b"7".ljust(len(was))), "no list of texts"),
                (content.replace(was, b"[7]".ljust(len(was))), "no list of texts"),
                (content.replace(b'"labels"', b'"titles"'), "damaged"),
            )
        ):
            replaced(file, damaged)
            # The server tells files apart by whole seconds.
            os.utime(file, (age, age))
            found.page.click(f"[data-name={NAMES[3]}]")
            found.page.wait_for_function(f"document.querySelector('#of-adapter').textContent.includes('{message}')")
            assert NAMES[3] in error_of(found.page)
            pressed = found.page.locator("#adapters [aria-pressed=true]").all_inner_texts()
            assert (pressed, found.page.locator("#classes").inner_text()) == ([NAMES[0]], classes)
            assert not found.page.locator("[aria-busy=true]").count()
        replaced(file, content)
        found.page.click(f"[data-name={NAMES[3]}]")
        found.page.wait_for_function(f"window.last.adapter == '{NAMES[3]}'")
        assert not found.page.locator(".error:not(:empty)").count()


def test_a_new_export_is_not_mixed_with_what_the_browser_has(site: Path, bert: Path, tmp_path: Path) -> None:
    other, folder = tiny_models.bert(tmp_path / "other", layers=1), tmp_path / "site"
    model = AutoModel.from_pretrained(other)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)
    model.save_pretrained(other)
    save_classifier(other, tmp_path / "adapters" / NAMES[0], 0, 3)
    linked(site, folder)
    with opened(folder, headers={"Cache-Control": "max-age=86400"}) as (found, _):
        found.page.fill("#text", TEXT)
        folder.rename(tmp_path / "before")
        export(tmp_path / "adapters", folder, "web", str(other))
        with_packages(folder)
        found.page.reload()
        found.page.wait_for_function(ANSWERED)
        found.page.evaluate("delete window.last")
        found.page.fill("#text", TEXT)
        found.page.wait_for_function(ANSWERED)
        expected = logits_of(other, tmp_path / "adapters" / NAMES[0], [TEXT])[0]
        np.testing.assert_allclose(found.page.evaluate("window.last.logits"), expected, atol=1e-4)


def test_a_bit_of_the_weights(site: Path, tmp_path: Path) -> None:
    (weights,) = linked(site, tmp_path / "site").glob("weights-*")
    content = weights.read_bytes()
    replaced(weights, content[:-5] + bytes([content[-5] ^ 64]) + content[-4:])
    with opened(tmp_path / "site") as (found, _):
        assert f"{weights.name} is damaged" in error_of(found.page)


MISSING = "put the whole exported folder there"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", MISSING),
        ("tokenizer.json", MISSING),
        ("tokenizer_config.json", MISSING),
        ("export.json", MISSING),
        ("layout.json", MISSING),
        ("adapters/index.json", MISSING),
        ("weights-*.bin", MISSING),
        ("dvora.js", "put the whole exported folder on the server"),
        ("vendor", "npm run vendor"),
    ],
)
def test_what_is_missing_is_named(name: str, message: str, site: Path, tmp_path: Path) -> None:
    (file,) = linked(site, tmp_path / "site").glob(name)
    file.unlink()
    with opened(tmp_path / "site") as (found, _):
        assert message in error_of(found.page)
        assert file.name in error_of(found.page)
        assert found.page.locator("#about").inner_text() == "The model is not loaded."
    # Some servers answer with a page where a file is missing.
    if name.endswith(".json"):
        file.write_text("<!doctype html>")
        with opened(tmp_path / "site") as (found, _):
            assert f"{name} is no JSON" in error_of(found.page)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("layout.json", "{}", "has no"),
        ("layout.json", "graphs", "has no graphs"),
        ("layout.json", "inputs", "has no inputs"),
        ("layout.json", "tokenizer", "has no tokenizer"),
        ("adapters/index.json", "{}", "has no name"),
        ("adapters/index.json", "[]", "has no name"),
        ("adapters/index.json", "[null]", "has no name"),
        ("config.json", "architectures", "has no architectures"),
        ("config.json", "7", "has no architectures"),
        ("export.json", "null", "has no base_model"),
        ("tokenizer.json", "null", "has no model"),
    ],
)
def test_what_is_of_another_shape_is_named(name: str, content: str, message: str, site: Path, tmp_path: Path) -> None:
    """A file that lacks one thing, or is something else."""
    file = linked(site, tmp_path / "site") / name
    if content.isalpha() and content != "null":
        whole = json.loads(file.read_text())
        content = json.dumps({key: value for key, value in whole.items() if key != content})
    replaced(file, content.encode())
    with opened(tmp_path / "site") as (found, _):
        assert f"{name} {message}" in error_of(found.page)
        assert found.page.locator("#about").inner_text() == "The model is not loaded."


def test_probabilities_of_a_language_model(site: Path) -> None:
    program = (
        "import { softmax } from './dvora.js'; console.log(Math.max(...softmax(new Float32Array(128256)).slice(0, 9)));"
    )
    command = ["node", "--input-type=module", "--eval", program]
    ended = subprocess.run(command, cwd=site, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert float(ended.stdout) == pytest.approx(1 / 128256)


def test_many_adapters_scroll_by_themselves(site: Path) -> None:
    with opened(site, PHONE) as (found, _):
        found.page.set_viewport_size({"width": PHONE, "height": 500})
        buttons = found.page.locator("#adapters")
        assert buttons.bounding_box()["height"] <= 500 * 0.4
        assert buttons.evaluate("each => each.scrollHeight > each.clientHeight")


def test_without_a_network(site: Path) -> None:
    with opened(site) as (found, _):
        found.page.route(f"**/{NAMES[1]}.*", lambda route: route.abort())
        found.page.click(f"[data-name={NAMES[1]}]")
        found.page.wait_for_selector("#of-adapter:not(:empty)")
        assert f"{NAMES[1]}.safetensors could not be fetched" in error_of(found.page)
        found.page.unroute(f"**/{NAMES[1]}.*")
        found.page.click(f"[data-name={NAMES[1]}]")
        found.page.wait_for_function(f"window.last.adapter == '{NAMES[1]}'")
        found.page.route("**/config.json", lambda route: route.abort())
        found.page.reload()
        found.page.wait_for_function(ANSWERED)
        assert "config.json could not be fetched" in error_of(found.page)


def test_the_download_is_shown_and_can_be_cancelled(site: Path) -> None:
    with opened(site) as (found, _):
        found.page.route("**/weights-*", lambda _: None)
        found.page.reload()
        found.page.wait_for_function("document.querySelector('#progress').value > 0")
        assert "MB of" in found.page.locator("#done").inner_text()
        found.page.click("text=Cancel")
        found.page.wait_for_function(ANSWERED)
        assert "cancelled" in error_of(found.page)
        found.page.unroute("**/weights-*")
        found.page.click("text=Load again")
        found.page.wait_for_function("window.last")
        # The other graph may be taken at once.
        found.page.route("**/weights-*", lambda _: None)
        found.page.reload()
        found.page.wait_for_function("document.querySelector('#progress').value > 0")
        found.page.click("[data-name=one-int8]")
        found.page.wait_for_function("window.last")
        assert not found.page.locator(".error:not(:empty)").count()
        found.page.unroute("**/weights-*")
        found.page.click("[data-name=one]")
        found.page.wait_for_function("document.querySelector('[data-name=one][aria-pressed=true]')")
        # The one that is there stays.
        found.page.route("**/one-int8-*", lambda _: None)
        found.page.click("[data-name=one-int8]")
        found.page.click("text=Cancel")
        found.page.wait_for_selector("#problem:not(:empty)")
        assert found.page.locator("#graphs [aria-pressed=true]").all_inner_texts()[0].startswith("float32")
        found.page.evaluate("delete window.last")
        found.page.fill("#text", TEXT)
        found.page.wait_for_function("window.last")


def test_int8_is_chosen_and_fetches_no_float_weights(site: Path, bert: Path) -> None:
    with opened(site) as (found, _):
        exact = found.page.evaluate("window.last.logits")
        before = len(found.complaints)
        found.page.evaluate("delete window.last")
        found.page.click("[data-name=one-int8]")
        found.page.wait_for_function("window.last")
        asked = found.complaints[before:]
        assert any("/one-int8-" in line for line in asked)
        assert not any("/weights-" in line for line in asked)
        assert 0 < np.abs(np.array(found.page.evaluate("window.last.logits")) - exact).max() < 0.1 * np.abs(exact).max()
        assert found.page.locator("#graphs [aria-pressed=true]").all_inner_texts()[0].startswith("int8")
        # Its address names it from then on, so that a link fetches nothing else.
        before = len(found.complaints)
        found.page.reload()
        found.page.wait_for_function("window.last")
        asked = found.complaints[before:]
        assert any("/one-int8-" in line for line in asked)
        assert not any("/weights-" in line or re.search("/one-[^i]", line) for line in asked)


LONG = "good movie " * 20


def cut_logits(bert: Path, adapter: Path | None, labels: int) -> np.ndarray:
    """Of the long text, as PyTorch's tokenizer cuts it."""
    return logits_of(bert, adapter, [" ".join(LONG.split()[:30])], labels)[0]


def test_a_long_text_is_cut(site: Path, bert: Path) -> None:
    (ids,) = AutoTokenizer.from_pretrained(bert)([LONG], truncation=True)["input_ids"]
    assert AutoTokenizer.from_pretrained(bert)(" ".join(LONG.split()[:30]))["input_ids"] == ids
    with opened(site) as (found, _):
        found.page.fill("#text", LONG)
        found.page.wait_for_selector("#cut:not(:empty)")
        assert "42 tokens; the model reads 32" in found.page.locator("#cut").inner_text()
        expected = cut_logits(bert, site.parent / "adapters" / NAMES[0] / "adapter", 3)
        np.testing.assert_allclose(found.page.evaluate("window.last.logits"), expected, atol=1e-4)
        found.page.fill("#text", TEXT)
        found.page.wait_for_function("!document.querySelector('#cut').textContent")


SOFTWARE = ("--enable-unsafe-webgpu", "--enable-unsafe-swiftshader", "--use-webgpu-adapter=swiftshader")
ISOLATED = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}


def test_what_computes_is_said(site: Path, bert: Path) -> None:
    expected = logits_of(bert, site.parent / "adapters" / NAMES[0] / "adapter", [TEXT])[0]
    for headers, args, said in (
        ({}, (), "computed by WebAssembly with 1 thread;"),
        (ISOLATED, (), rf"computed by WebAssembly with {min(4, os.cpu_count() or 1)} threads?;"),
        ({}, (*SOFTWARE, "--enable-features=Vulkan"), r"computed by WebGPU \(add \?wasm"),
    ):
        with opened(site, headers=headers, args=args) as (found, _):
            if "WebGPU" in said and not found.page.evaluate("navigator.gpu?.requestAdapter().then(Boolean)"):
                continue
            assert re.search(said, found.page.locator("#about").inner_text())
            found.page.evaluate("delete window.last")
            found.page.fill("#text", TEXT)
            found.page.wait_for_function("window.last")
            np.testing.assert_allclose(found.page.evaluate("window.last.logits"), expected, atol=1e-3)


def contrast(one: Sequence[int], other: Sequence[int]) -> float:
    """As the guidelines for accessibility define it."""

    def light(colour: Sequence[int]) -> float:
        parts = [part / 255 / 12.92 if part <= 10 else ((part / 255 + 0.055) / 1.055) ** 2.4 for part in colour]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    lighter, darker = sorted((light(one), light(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_can_be_read_and_touched(scheme: str, site: Path) -> None:
    with opened(site, PHONE, scheme) as (found, _):
        page = found.page
        page.route(f"**/{NAMES[1]}.*", lambda route: route.abort())
        page.click(f"[data-name={NAMES[1]}]")
        page.wait_for_selector("#of-adapter:not(:empty)")
        paper, button = found.colour("body", "background-color"), "#adapters [aria-pressed=true]"
        for selector in ("#of-adapter", "#about", "#state", "main"):
            assert contrast(found.colour(selector), paper) >= 4.5, selector
        assert contrast(found.colour(button), found.colour(button, "background-color")) >= 4.5
        heights = [each.bounding_box()["height"] for each in page.locator("button:visible").all()]
        assert len(heights) == len(NAMES) + 2
        assert min(heights) >= 44
        # The error is right below the buttons that it is about, and is read out, as answers are.
        assert page.locator("#adapters + #of-adapter[role=alert]").count() == 1
        assert "good" in page.locator("main [aria-live=polite]").inner_text()
        assert found.width() <= PHONE


def test_opened_as_a_file(site: Path) -> None:
    with seen(site / "index.html", root=site) as found:
        assert "python -m http.server" in error_of(found.page)
        assert not found.complaints


def test_what_no_browser_can_do(site: Path, tmp_path: Path) -> None:
    page = linked(site, tmp_path / "site") / "index.html"
    text = (site / "index.html").read_text()
    for script, message in (
        ("delete WebAssembly", "has no WebAssembly"),
        ("Object.defineProperty(crypto, 'subtle', {})", "serve this one by https"),
    ):
        replaced(page, text.replace("<head>", f"<head><script>{script}</script>").encode())
        with opened(page.parent) as (found, _):
            assert message in error_of(found.page)


def test_another_version_of_the_format(site: Path, tmp_path: Path) -> None:
    layout = linked(site, tmp_path / "site") / "layout.json"
    replaced(layout, (site / "layout.json").read_bytes().replace(b'"version": 2', b'"version": 3'))
    with opened(tmp_path / "site") as (found, _):
        assert "export the model again" in error_of(found.page)


def test_a_worker(site: Path, bert: Path) -> None:
    """That of the documentation."""
    (site / "worker.js").write_text(program("worker.js"))
    (site / "own.html").write_text("<!doctype html><link rel='icon' href='data:,'>")
    with served(site) as address, seen(f"{address}own.html") as found:
        answer = found.page.evaluate(
            """([text, name]) => new Promise((resolve, reject) => {
                const worker = new Worker("./worker.js", { type: "module" });
                worker.onerror = error => reject(error.message);
                worker.onmessage = ({ data }) => data === "ready" ? worker.postMessage({ text, name }) : resolve(data);
            })""",
            [TEXT, NAMES[2]],
        )
    expected = logits_of(bert, site.parent / "adapters" / NAMES[2] / "adapter", [TEXT])[0]
    np.testing.assert_allclose(answer["shares"], torch.tensor(expected).softmax(0), atol=1e-4)
    assert answer["labels"] == ["bad", "so <b>so</b>", "good"]


def program(name: str) -> str:
    """A program of the documentation."""
    (found,) = re.findall(rf"^```js\n// {name}\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    return str(found)


def in_node(site: Path, place: str, runtime: str = "onnxruntime-web") -> subprocess.CompletedProcess[str]:
    """The program of the documentation."""
    (site / "node.mjs").write_text(program("node.mjs").replace('"onnxruntime-web"', f'"{runtime}"'))
    return subprocess.run(["node", "node.mjs", place], cwd=site, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("runtime", ["onnxruntime-web", "onnxruntime-node"])
def test_in_node(runtime: str, site: Path, bert: Path, tmp_path: Path) -> None:
    text = "a fine film"
    expected = {
        name: torch.tensor(logits_of(bert, site.parent / "adapters" / name / "adapter", [text])[0]).softmax(0)
        for name in NAMES
    }
    with served(site) as address:
        for place in (".", str(site), site.as_uri(), address):
            ended = in_node(site, place, runtime)
            assert ended.returncode == 0, ended.stderr
            rows = re.findall(r"^(\S+) \[(.*?)\]", ended.stdout, re.M | re.S)
            assert [name for name, _ in rows] == ["null", *NAMES]
            for name, shares in rows[1:]:
                np.testing.assert_allclose([float(share) for share in shares.split(",")], expected[name], atol=1e-4)
    linked(site, tmp_path / "site")
    (tmp_path / "site" / "layout.json").unlink()
    ended = in_node(site, str(tmp_path / "site"))
    assert "layout.json is not in file://" in ended.stderr


def test_types_name_what_the_module_has(site: Path) -> None:
    names = re.compile(r"^export (?:async )?(?:class|function) (\w+)", re.M)
    module, types = ((site / file).read_text() for file in ("dvora.js", "dvora.d.ts"))
    assert sorted(names.findall(module)) == sorted(names.findall(types))
    method = re.compile(r"^  (?:static )?(?:async )?(\w+)[<(]", re.M)
    assert set(method.findall(module)) - {"catch"} == set(method.findall(types))


def test_what_is_uploaded(site: Path) -> None:
    """What `vendor.mjs` copies is all that the page asks for; the packages have hundreds of megabytes."""
    files = [file for file in VENDOR.rglob("*") if file.is_file()]
    assert len(files) <= 15
    assert sum(file.stat().st_size for file in files) < 50e6
    with opened(site) as (found, _):
        assert not any("node_modules" in line for line in found.complaints)


@pytest.fixture(scope="module")
def sites(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of adapters and their sites: for classes, vectors, texts and a number."""
    folder = tmp_path_factory.mktemp("sites")
    llama = tiny_models.llama(folder / "llama")
    for number, name in enumerate(("films", "shop")):
        save_classifier(bert, folder / "classes" / name / "adapter", number, 2)
        (folder / "classes" / name / "run.json").write_text(json.dumps({"labels": [f"no {name}", name]}))
        save_trained(bert, folder / "vectors" / name / "adapter", number)
        save_trained(llama, folder / "texts" / name / "adapter", number, task_type="CAUSAL_LM")
    save_classifier(bert, folder / "number" / "films" / "adapter", 0, 1)
    for name, base in (("classes", bert), ("vectors", bert), ("texts", llama), ("number", bert)):
        export(folder / name, folder / f"{name}-site", "web", str(base))
        with_packages(folder / f"{name}-site")
    return folder


@pytest.mark.parametrize(("name", "architecture"), [("vectors", "BertModel"), ("texts", "LlamaForCausalLM")])
def test_what_the_page_cannot_show(name: str, architecture: str, sites: Path) -> None:
    with opened(sites / f"{name}-site") as (found, _):
        assert f"{architecture} gives neither" in error_of(found.page)
        # The model was not even fetched.
        assert not any("/weights-" in line for line in found.complaints)


def test_a_number(sites: Path, bert: Path) -> None:
    with opened(sites / "number-site") as (found, _):
        found.page.fill("#text", TEXT)
        expected = logits_of(bert, sites / "number" / "films" / "adapter", [TEXT], 1)[0, 0]
        found.page.wait_for_function(f"Math.abs(document.querySelector('#classes').innerText - {expected}) < 1e-3")


@contextmanager
def page_with(site: Path, program: str | None = None) -> Iterator[Seen]:
    """The page with pipelines that the documentation has, in a site; another program may use what it loads."""
    block = re.search(r"^```html\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert block is not None
    text = block[1] if program is None else block[1].partition("const films")[0] + program + "</script>"
    (site / "own.html").write_text(f"<!doctype html><link rel='icon' href='data:,'><body>{text}</body>")
    with served(site) as address, seen(f"{address}own.html") as found:
        yield found
        asked = [line.removeprefix("asked for ") for line in found.complaints if line.startswith("asked for ")]
        assert all(line.startswith(address) for line in asked)


BOTH = ("films", "null", "shop")
EVERYTHING = "Object.assign(window, { ort, transformers, Pipelines, pipelines });"


def answers(site: Path, task: str, texts: list[Any], options: dict[str, Any]) -> dict[str, Any]:
    """Of a pipeline for each adapter and one for the base, all called at once."""
    with page_with(site, EVERYTHING) as found:
        found.page.wait_for_function("window.pipelines")
        listed = found.page.evaluate(
            """([task, names, texts, options]) => Promise.all(names.map(async name => {
                const answer = await (await pipelines.pipeline(transformers[task], name))(texts, options);
                return answer.tolist ? answer.tolist() : answer;
            }))""",
            [task, BOTH, texts, options],
        )
        return dict(zip(BOTH, listed, strict=True))


def adapter_of(sites: Path, kind: str, name: str) -> Path | None:
    return None if name == "null" else sites / kind / name / "adapter"


def test_the_pipelines_on_the_page_of_the_documentation(sites: Path, bert: Path) -> None:
    with page_with(sites / "classes-site") as found:
        found.page.wait_for_function("document.body.innerText.startsWith('[')")
        shown = json.loads(found.page.locator("body").inner_text())
    for (answer,), name, text in zip(shown, ("films", "shop"), ("a fine film", "it broke"), strict=True):
        logits = logits_of(bert, adapter_of(sites, "classes", name), [text], 2)[0]
        shares = torch.tensor(logits).softmax(0)
        assert answer["label"] == [f"no {name}", name][int(shares.argmax())]
        assert answer["score"] == pytest.approx(float(shares.max()), abs=1e-4)


def test_classes_by_a_pipeline(sites: Path, bert: Path) -> None:
    texts = ["good movie", "the book was very bad", "it", LONG]
    for name, rows in answers(sites / "classes-site", "TextClassificationPipeline", texts, {"top_k": 2}).items():
        # The base has no names; those of an adapter are its own.
        labels = ["LABEL_0", "LABEL_1"] if name == "null" else [f"no {name}", name]
        scores = [[{each["label"]: each["score"] for each in row}[label] for label in labels] for row in rows]
        adapter = adapter_of(sites, "classes", name)
        logits = [*logits_of(bert, adapter, texts[:3], 2), cut_logits(bert, adapter, 2)]
        expected = torch.tensor(np.array(logits)).softmax(1)
        np.testing.assert_allclose(scores, expected, atol=1e-4)


def test_vectors_by_a_pipeline(sites: Path, bert: Path) -> None:
    texts = ["good movie", "the book was very bad"]
    inputs = AutoTokenizer.from_pretrained(bert)(texts, padding=True, return_tensors="pt")
    for name, vectors in answers(sites / "vectors-site", "FeatureExtractionPipeline", texts, {}).items():
        model: Any = AutoModel.from_pretrained(bert).eval()
        if (adapter := adapter_of(sites, "vectors", name)) is not None:
            model = PeftModel.from_pretrained(model, adapter).eval()
        with torch.no_grad():
            np.testing.assert_allclose(vectors, model(**inputs).last_hidden_state, atol=1e-4)
    # They are not taken for classes.
    with pytest.raises(Exception, match="logits is not iterable"):
        answers(sites / "vectors-site", "TextClassificationPipeline", texts, {})


def test_texts_by_a_pipeline(sites: Path) -> None:
    alone, options = Alone(sites / "llama"), {"max_new_tokens": 12, "do_sample": False}
    prompts = ["the ", "a good day"]
    for name, rows in answers(sites / "texts-site", "TextGenerationPipeline", prompts, options).items():
        adapter = adapter_of(sites, "texts", name)
        expected = [prompt + alone.continued(adapter, prompt, 12) for prompt in prompts]
        assert [row[0]["generated_text"] for row in rows] == expected
    messages = [{"role": "user", "content": "good"}]
    prompt = alone.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    for name, (row,) in answers(sites / "texts-site", "TextGenerationPipeline", messages, options).items():
        answer = alone.continued(adapter_of(sites, "texts", name), prompt, 12)
        assert row["generated_text"][-1] == {"role": "assistant", "content": answer}


def test_what_pipelines_refuse(sites: Path) -> None:
    """A copy of onnxruntime of its own, a model that transformers.js does not know, an adapter of another base."""
    site = sites / "classes-site"
    other = (sites / "vectors-site" / "adapters" / "shop.safetensors").read_bytes()
    (site / "adapters" / "other.safetensors").write_bytes(other)
    index = site / "adapters" / "index.json"
    listed = json.loads(index.read_text())
    index.write_text(json.dumps([*listed, {**listed[0], "name": "other", "file": "other.safetensors"}]))
    with page_with(site, EVERYTHING) as found:
        found.page.wait_for_function("window.pipelines")
        for call, message in (
            (
                "import('./node_modules/@huggingface/transformers/dist/transformers.min.js')"
                ".then(bundled => Pipelines.load(ort, bundled))",
                "another copy of onnxruntime",
            ),
            ("Pipelines.load(ort, { Tensor: transformers.Tensor })", "has no BertForSequenceClassification"),
            ("pipelines.pipeline(transformers.TextClassificationPipeline, 'other')", "another base"),
            ("pipelines.pipeline(transformers.TextClassificationPipeline, 'none')", "there is no adapter none"),
            ("Pipelines.load(ort, transformers, './', { graph: 'one-int8' })", "export with --int8"),
            ("Pipelines.load(ort, transformers, './', { signal: AbortSignal.abort(Error('stopped')) })", "stopped"),
        ):
            assert message in found.page.evaluate(f"{call}.then(() => 'taken', error => error.message)")
