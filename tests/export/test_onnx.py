"""ONNX graphs whose adapter is an input, run by onnxruntime: what the adapted PyTorch model gives."""

import json
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from dvora.adapter_file.content import vector_digest
from dvora.export.onnx import _compared
from dvora.export.packed import graph_file, read_layout, read_packed
from dvora.export.verified import sample_of_encoder
from dvora.recipes.adapters.exporting import export
from tests.peft.kinds import GROUPS, by_groups
from tests.recipes import tiny_models
from tests.serve.served import Alone, save_classifier, save_trained

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed")
TEXTS = ["good movie", "the book was very bad", "it"]


@pytest.fixture(scope="module", params=[1, GROUPS], ids=["one group", "groups"])
def classifiers(request: pytest.FixtureRequest, bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a to d of DVoRA, l and m of LoRA, of three classes each."""
    folder = tmp_path_factory.mktemp("classifiers")
    for number, name in enumerate("abcd"):
        save_classifier(bert, folder / name, number, 3, lambda_d_groups=request.param)
    some: dict[str, Any] = {"rank": 3, "target_modules": ["query", "dense"], "use_rslora": True}
    save_classifier(bert, folder / "l", 4, 3, method="lora", **some)
    save_classifier(bert, folder / "m", 5, 3, method="lora", rank=5, rank_pattern={"query": 2}, lora_alpha=7)
    return folder


@pytest.fixture(scope="module")
def exported(bert: Path, classifiers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "folder"
    export(classifiers, folder, "onnx", str(bert), int8=True)
    return folder


def inputs_of(base: Path, texts: list[str]) -> dict[str, np.ndarray]:
    return dict(AutoTokenizer.from_pretrained(base)(texts, padding=True, return_tensors="np"))


def logits_of(base: Path, adapter: Path | None, texts: list[str], labels: int = 3) -> np.ndarray:
    with torch.random.fork_rng():
        # Of the head that a base without one gets.
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels)
    model = (model if adapter is None else PeftModel.from_pretrained(model, adapter)).eval()
    with torch.no_grad():
        logits: np.ndarray = model(
            **AutoTokenizer.from_pretrained(base)(texts, padding=True, return_tensors="pt")
        ).logits.numpy()
    return logits


def vector(folder: Path, name: str) -> np.ndarray:
    values: np.ndarray = load_file(folder / "adapters" / f"{name}.safetensors")["adapter"].numpy()
    return values


def file_of(folder: Path, graph: str) -> Path:
    """The file that the layout names."""
    return folder / str(json.loads((folder / "layout.json").read_text())["graphs"][graph]["file"])


def session(folder: Path, graph: str) -> "onnxruntime.InferenceSession":
    return onnxruntime.InferenceSession(file_of(folder, graph), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("texts", [TEXTS, TEXTS[2:], TEXTS * 3], ids=len)
def test_an_adapter_a_call(texts: list[str], exported: Path, bert: Path, classifiers: Path) -> None:
    one = session(exported, "one")
    for name in "abcdlm":
        logits = one.run(["output"], {"adapter": vector(exported, name), **inputs_of(bert, texts)})[0]
        np.testing.assert_allclose(logits, logits_of(bert, classifiers / name, texts), rtol=1e-5, atol=1e-5)


def test_a_row_of_a_table_for_each_row_of_a_batch(exported: Path, bert: Path, classifiers: Path) -> None:
    names, batch = ("c", "l", "a", "m", "d", "null"), TEXTS * 2
    table = np.stack([vector(exported, name) for name in names] * 300)
    given = {"adapters": table, "index": np.array([1798, 0, 1, 2, 3, 1]), **inputs_of(bert, batch)}
    logits = session(exported, "table").run(["output"], given)[0]
    for row, name in enumerate("dclaml"):
        expected = logits_of(bert, classifiers / name, batch)[row]
        np.testing.assert_allclose(logits[row], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["b", "m"])
def test_files_of_onnxruntime(exported: Path, bert: Path, classifiers: Path, name: str) -> None:
    files, adapter, options = session(exported, "files"), onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    adapter.Load(str(exported / "adapters" / f"{name}.onnx_adapter"))
    options.add_active_adapter(adapter)
    logits = files.run(["output"], inputs_of(bert, TEXTS), options)[0]
    np.testing.assert_allclose(logits, logits_of(bert, classifiers / name, TEXTS), rtol=1e-5, atol=1e-5)
    # Without one it is the base.
    null = session(exported, "one").run(["output"], {"adapter": vector(exported, "null"), **inputs_of(bert, TEXTS)})
    np.testing.assert_array_equal(files.run(["output"], inputs_of(bert, TEXTS))[0], null[0])


def test_the_base_has_int8_weights_and_the_adapter_none(exported: Path, bert: Path, classifiers: Path) -> None:
    import onnx

    graph = onnx.load(file_of(exported, "one-int8")).graph
    # Unsigned: signed ones overflow on processors without VNNI, and are off by half of the largest logit there.
    kinds = [tensor.data_type for tensor in graph.initializer if len(tensor.dims) == 2]
    assert (kinds.count(onnx.TensorProto.UINT8), kinds.count(onnx.TensorProto.INT8)) == (7, 0)
    given = {"adapter": vector(exported, "a"), **inputs_of(bert, TEXTS)}
    logits = session(exported, "one-int8").run(["output"], given)[0]
    exact = logits_of(bert, classifiers / "a", TEXTS)
    assert 0 < np.abs(logits - exact).max() < 0.05 * np.abs(exact).max()


def test_the_graphs_are_one_behind_different_first_nodes(exported: Path) -> None:
    """PyTorch traces the model once: all that takes long is done once."""
    import onnx

    names = ("one", "table", "files")
    one, table, files = ([*onnx.load(file_of(exported, name), load_external_data=False).graph.node] for name in names)
    # A row before the first is one behind the last, which is refused as others are that are not there.
    refused = ["Shape", "Less", "Where"]
    # So is an index of other rows than those of the batch, which has a column beside it.
    refused += ["Unsqueeze", "Shape", "Expand", "Unsqueeze", "Concat", "ReduceSum"]
    assert [node.op_type for node in table[: len(refused) + 1]] == [*refused, "Gather"]
    assert one[0].op_type == "Unsqueeze"
    assert one == files
    assert one[1:] == table[len(refused) + 1 :]


@pytest.mark.parametrize("row", [-1, -2, 4])
def test_a_row_that_is_not_in_the_table_is_refused(exported: Path, bert: Path, row: int) -> None:
    table = np.stack([vector(exported, name) for name in "abcd"])
    given = {"adapters": table, "index": np.array([0, row, 1]), **inputs_of(bert, TEXTS)}
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument, match="out of data bounds"):
        session(exported, "table").run(["output"], given)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_an_index_of_another_number_of_rows_is_refused(exported: Path, bert: Path, rows: int) -> None:
    """One would be broadcast to all."""
    table = np.stack([vector(exported, name) for name in "abcd"])
    given = {"adapters": table, "index": np.zeros(rows, np.int64), **inputs_of(bert, TEXTS)}
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.Fail, match=r"Concat.* must match"):
        session(exported, "table").run(["output"], given)


def test_a_graph_that_onnxruntime_cannot_run_is_named(exported: Path, bert: Path, tmp_path: Path) -> None:
    sample = sample_of_encoder(
        {name: torch.tensor(values) for name, values in inputs_of(bert, TEXTS).items()}, "logits"
    )
    vectors = {"a": torch.zeros(3)}
    (tmp_path / "damaged.onnx").write_bytes(b"no graph")
    files = {"damaged.onnx": tmp_path / "damaged.onnx", "one.onnx": file_of(exported, "one")}
    for name, file in files.items():
        with pytest.raises(ValueError, match=f"^model: onnxruntime cannot run the graph {name}: .+$"):
            [*_compared({name: file}, vectors, {"a": [np.zeros((3, 3), np.float32)]}, sample)]


def test_the_weights_are_there_once_and_the_layout_names_every_value(exported: Path, bert: Path) -> None:
    import onnx

    matrices = [t for t in onnx.load(file_of(exported, "one")).graph.initializer if len(t.dims) > 1]
    assert len({(*tensor.dims, tensor.raw_data) for tensor in matrices}) == len(matrices) > 10
    base = sum(parameter.nbytes for parameter in AutoModel.from_pretrained(bert).parameters())
    layout = json.loads((exported / "layout.json").read_text())
    (weights,) = exported.glob("weights-*.bin")
    assert weights.stat().st_size < 3 * base
    assert all(file_of(exported, graph).stat().st_size < 200_000 for graph in ("one", "table", "files"))
    assert layout["size"] == len(vector(exported, "a"))
    ends = [entry["offset"] + int(np.prod(entry["shape"])) for entry in layout["entries"]]
    assert [entry["offset"] for entry in layout["entries"]] == [0, *ends[:-1]]
    assert ends[-1] == layout["size"]


def test_files_are_named_by_their_content_in_the_layout(exported: Path) -> None:
    graphs = json.loads((exported / "layout.json").read_text())["graphs"]
    # The int8 graph needs no other weights.
    assert [name for name, graph in graphs.items() if "weights" not in graph] == ["one-int8"]
    named = [*graphs.values(), *(graph["weights"] for graph in graphs.values() if "weights" in graph)]
    for about in named:
        content = (exported / about["file"]).read_bytes()
        assert about["sha256"] == sha256(content).hexdigest()
        assert about["bytes"] == len(content)
        assert f"-{about['sha256'][:16]}." in about["file"]
    others = {file.name for file in exported.iterdir() if file.suffix in (".onnx", ".bin")}
    assert others == {about["file"] for about in named}


def test_the_layout_says_what_a_runtime_has_to_know(exported: Path, bert: Path) -> None:
    layout = json.loads((exported / "layout.json").read_text())
    assert layout["model"] == "BertForSequenceClassification"
    assert [about["is"] for about in layout["outputs"]] == ["logits"]
    for graph, about in layout["graphs"].items():
        inputs = session(exported, graph).get_inputs()
        listed = [*about["adapter_inputs"], *layout["inputs"]]
        assert [each.name for each in inputs] == [each["name"] for each in listed]
        for actual, said in zip(inputs, listed, strict=True):
            assert actual.type == {"float32": "tensor(float)", "int64": "tensor(int64)"}[said["dtype"]]
            sizes = [size if isinstance(size, int) else None for size in said["dimensions"]]
            assert [size if isinstance(size, int) else None for size in actual.shape] == sizes
    # As the exported tokenizer cuts and pads, also where no one asks it to.
    texts = ["good " * 40, "it"]
    tokenizer = Tokenizer.from_file(str(exported / "tokenizer.json"))
    long, short = (encoding.ids for encoding in tokenizer.encode_batch(texts))
    expected = AutoTokenizer.from_pretrained(bert)(texts, padding=True, truncation=True)["input_ids"]
    assert [long, short] == expected
    assert len(long) == layout["tokenizer"]["longest"] == 32
    assert layout["tokenizer"]["padding"] == {"direction": "right", "pad_id": 0, "pad_token": "[PAD]"}
    assert short[-1] == 0


def test_nothing_names_a_folder_of_this_machine(exported: Path, bert: Path) -> None:
    for file in exported.rglob("*.json"):
        assert str(bert.parent) not in file.read_text()
        assert str(exported.parent) not in file.read_text()
    assert json.loads((exported / "export.json").read_text())["base_model"] == bert.name


def test_a_packed_adapter_is_read_whole_or_refused(exported: Path, tmp_path: Path) -> None:
    layout = json.loads((exported / "layout.json").read_text())
    listed = {about["name"]: about for about in json.loads((exported / "adapters" / "index.json").read_text())}
    assert [*listed] == ["null", *"abcdlm"]
    source = exported / "adapters" / listed["a"]["file"]
    read, content = read_packed(source, layout), source.read_bytes()
    np.testing.assert_array_equal(read.vector, vector(exported, "a"))
    assert read.labels == listed["a"]["labels"]
    assert listed["a"]["bytes"] == len(content)
    # Of this layout, this name, these labels and these values.
    values = content[-4 * layout["size"] :]
    assert packed_digest(layout, "a", read.labels, values) == listed["a"]["digest"]
    infinite = np.frombuffer(values, np.float32).copy()
    infinite[3] = np.nan
    hidden = content[: -len(values)].replace(
        listed["a"]["digest"].encode(), packed_digest(layout, "a", read.labels, infinite.tobytes()).encode()
    )
    flipped = bytes([*content[:-1], content[-1] ^ 1])
    for damaged, message in (
        (flipped, "its digest is"),
        (content[: -len(values)] + infinite.tobytes(), "its digest is"),
        (hidden + infinite.tobytes(), "not finite"),
        (content.replace(layout["digest"].encode(), b"0" * 32), "its layout is '0000"),
        (content.replace(b'"version":"2"', b'"version":"1"'), "its version is '1', expected '2'"),
        (content[:-4], "damaged"),
        (b"", "damaged"),
    ):
        (tmp_path / "a.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            read_packed(tmp_path / "a.safetensors", layout)


def packed_digest(layout: dict[str, Any], name: str, labels: list[str], values: bytes) -> str:
    return vector_digest(f"{layout['digest']}\n{name}\n{json.dumps(labels)}", values)


def test_adapters_that_changed_their_files_are_refused(exported: Path, tmp_path: Path) -> None:
    layout = read_layout(exported)
    (tmp_path / "a.safetensors").write_bytes((exported / "adapters" / "b.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"a\.safetensors is no packed adapter .* its name is 'b', expected 'a'"):
        read_packed(tmp_path / "a.safetensors", layout)


@pytest.mark.parametrize(
    ("labels", "is_signed", "message"),
    [
        ('["good", "bad", "so"]', False, "its digest is"),
        ('"good"', True, "expected a list of texts"),
        ("[1, 2, 3]", True, "expected a list of texts"),
        ("[" * 100_000, True, "or damaged"),
        ("[", True, "or damaged"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_labels_that_are_not_those_of_the_export_are_refused(
    exported: Path, tmp_path: Path, labels: str, is_signed: bool, message: str
) -> None:
    layout, file = read_layout(exported), tmp_path / "a.safetensors"
    with safe_open(exported / "adapters" / file.name, "pt") as opened:
        about, values = opened.metadata(), opened.get_tensor("adapter")
    if is_signed:
        digest = vector_digest(f"{layout['digest']}\na\n{labels}", values.numpy().tobytes())
        about["digest"] = digest
    save_file({"adapter": values}, file, {**about, "labels": labels})
    with pytest.raises(ValueError, match=message) as refusal:
        read_packed(file, layout)
    assert str(file) in str(refusal.value)


def test_a_graph_is_run_with_the_weights_that_the_layout_names(exported: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(exported, tmp_path / "copy")
    layout = read_layout(copy)
    assert graph_file(copy, layout, "table") == file_of(copy, "table")
    with pytest.raises(ValueError, match=r"there is no 'two' in .*, but one, table, files, one-int8"):
        graph_file(copy, layout, "two")
    (weights,) = copy.glob("weights-*.bin")
    content = bytearray(weights.read_bytes())
    content[-5] ^= 64
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=f"{weights.name} is damaged"):
        graph_file(copy, layout, "table")
    # It has others.
    assert graph_file(copy, layout, "one-int8") == file_of(copy, "one-int8")
    for text, message in (
        ("{}", "is damaged"),
        ("[" * 100_000, "is damaged"),
        ('{"format": "dvora-packed", "version": 1}', "export the model again"),
    ):
        (copy / "layout.json").write_text(text)
        with pytest.raises(ValueError, match=f"layout.json .*{message}"):
            read_layout(copy)


@by_groups
def test_texts_are_generated_with_a_cache(groups: int, tmp_path: Path) -> None:
    """Two rows with an adapter each, of DVoRA and of LoRA, token by token: what the merged models generate."""
    llama = tiny_models.llama(tmp_path / "llama")
    for name, method, settings in (("a", "dvora", {"lambda_d_groups": groups}), ("b", "lora", {})):
        save_trained(llama, tmp_path / "adapters" / name, 1, task_type="CAUSAL_LM", method=method, **settings)
    export(tmp_path / "adapters", tmp_path / "exported", "onnx", str(llama))
    table, alone = session(tmp_path / "exported", "table"), Alone(llama)
    layout = json.loads((tmp_path / "exported" / "layout.json").read_text())
    listed = [about["name"] for about in (*layout["graphs"]["table"]["adapter_inputs"], *layout["inputs"])]
    assert listed == [inputs.name for inputs in table.get_inputs()]
    assert [about["name"] for about in layout["outputs"]] == [output.name for output in table.get_outputs()]
    assert layout["inputs"][3]["dimensions"] == ["rows", 1, "past", 8]
    assert layout["outputs"][1] == {"name": "present.0.key", "dtype": "float32", "is": "the next past_key_values.0.key"}
    assert layout["tokenizer"]["padding"]["direction"] == "left"
    alone.tokenizer.pad_token = alone.tokenizer.eos_token
    prompts = ["the ", "a good day"]
    read = alone.tokenizer(prompts, padding=True, padding_side="left", return_tensors="np")
    ids, mask = read["input_ids"], read["attention_mask"]
    caches = {
        inputs.name: np.zeros((2, inputs.shape[1], 0, inputs.shape[3]), np.float32)
        for inputs in table.get_inputs()
        if inputs.name.startswith("past_key_values")
    }
    adapters = {"adapters": np.stack([vector(tmp_path / "exported", name) for name in "ab"]), "index": np.array([0, 1])}
    generated = []
    for _ in range(12):
        positions = (mask.cumsum(1) - 1).clip(0)[:, -ids.shape[1] :]
        given = {**adapters, "input_ids": ids, "attention_mask": mask, "position_ids": positions, **caches}
        logits, *present = table.run(None, given)
        caches = dict(zip(caches, present, strict=True))
        ids = logits.argmax(1)[:, None]
        mask = np.concatenate([mask, np.ones_like(ids)], 1)
        generated.append(ids)
    for row, name, prompt in zip(np.concatenate(generated, 1), "ab", prompts, strict=True):
        expected = alone.continued(tmp_path / "adapters" / name, prompt, 12)
        assert alone.tokenizer.decode(row, skip_special_tokens=True) == expected


def test_pixels(tmp_path: Path) -> None:
    vit = tiny_models.vit(tmp_path / "vit", layers=1)
    save_trained(vit, tmp_path / "adapters" / "a", 1)
    values = export(tmp_path / "adapters", tmp_path / "exported", "onnx", str(vit))
    assert values["differences"]["one.onnx"] < 1e-4


def test_what_is_refused_leaves_nothing(bert: Path, classifiers: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    save_classifier(bert, mixed / "a", 0, 3)
    save_classifier(bert, mixed / "b", 0, 2)
    with pytest.raises(ValueError, match="as many classes together"):
        export(mixed, tmp_path / "exported", "onnx", str(bert))
    other = tiny_models.bert(tmp_path / "other", layers=1)
    model = AutoModel.from_pretrained(other)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(other)
    with pytest.raises(ValueError, match="base"):
        export(classifiers, tmp_path / "exported", "onnx", str(other))
    assert not (tmp_path / "exported").exists()
    assert not list(tmp_path.glob(".*"))
