"""The exported page in a real browser; under `make web`, which installs what it runs with from npm."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModel, AutoTokenizer

import dvora
from benchmarks.exporting import PACKAGES, served
from dvora.recipes.adapters.exporting import export
from tests.export.test_onnx import logits_of
from tests.recipes import tiny_models
from tests.serve.served import Alone, save_classifier, save_trained
from tests.tools.pages.seen import PHONE, WIDE, Seen, seen

pytestmark = pytest.mark.skipif(not PACKAGES.is_dir(), reason="make web has it")
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
    export(folder / "adapters", folder / "site", "web", str(bert))
    (folder / "site" / "node_modules").symlink_to(PACKAGES)
    return folder / "site"


@contextmanager
def opened(site: Path, width: int = WIDE, scheme: str = "light") -> Iterator[tuple[Seen, str]]:
    """The page, and the address of its folder."""
    with served(site) as address, seen(f"{address}index.html", width, scheme) as found:
        found.page.wait_for_function("window.last || document.querySelector('.error')")
        yield found, address


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
        (folder / f"{name}-site" / "node_modules").symlink_to(PACKAGES)
    return folder


@pytest.mark.parametrize(("name", "architecture"), [("vectors", "BertModel"), ("texts", "LlamaForCausalLM")])
def test_what_the_page_cannot_show(name: str, architecture: str, sites: Path) -> None:
    with opened(sites / f"{name}-site") as (found, _):
        assert f"{architecture} gives neither" in found.page.locator(".error").inner_text()
        # The model was not even fetched.
        assert not any("weights.bin" in line for line in found.complaints)


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
    texts = ["good movie", "the book was very bad", "it"]
    for name, rows in answers(sites / "classes-site", "TextClassificationPipeline", texts, {"top_k": 2}).items():
        # The base has no names; those of an adapter are its own.
        labels = ["LABEL_0", "LABEL_1"] if name == "null" else [f"no {name}", name]
        scores = [[{each["label"]: each["score"] for each in row}[label] for label in labels] for row in rows]
        expected = torch.tensor(logits_of(bert, adapter_of(sites, "classes", name), texts, 2)).softmax(1)
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
    with page_with(site, EVERYTHING) as found:
        found.page.wait_for_function("window.pipelines")
        for program, message in (
            (
                "import('./node_modules/@huggingface/transformers/dist/transformers.min.js')"
                ".then(bundled => Pipelines.load(ort, bundled))",
                "another copy of onnxruntime",
            ),
            ("Pipelines.load(ort, { Tensor: transformers.Tensor })", "has no BertForSequenceClassification"),
            ("pipelines.pipeline(transformers.TextClassificationPipeline, 'other')", "another base"),
            ("pipelines.pipeline(transformers.TextClassificationPipeline, 'none')", "404"),
        ):
            assert message in found.page.evaluate(f"{program}.then(() => 'taken', error => error.message)")
