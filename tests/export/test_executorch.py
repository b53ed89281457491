"""A program of ExecuTorch, run by its Python runtime: what the adapted PyTorch model gives.

Without ExecuTorch this is skipped; `make executorch` installs it. Lowering takes most of a minute, so models are small.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, BertConfig, BertModel

import dvora
from dvora.recipes.adapters.exporting import export
from tests.export.test_onnx import inputs_of, logits_of, vector
from tests.recipes import tiny_models
from tests.serve.served import save_classifier, save_trained

if TYPE_CHECKING:
    from executorch.runtime import Method

pytestmark = [
    pytest.mark.skipif(find_spec("executorch") is None, reason="make executorch has it"),
    # Of torchao and coremltools, which ExecuTorch imports.
    pytest.mark.filterwarnings("ignore"),
]
PAGE = Path(dvora.__file__).parents[2] / "docs" / "how-to" / "export.md"
COMMANDS, PROGRAM = re.findall(
    r"^```(?:sh|python)\n(.*?)^```", PAGE.read_text(encoding="utf-8").partition("## ExecuTorch")[2], re.M | re.S
)
NAMES = ("films", "shop", "news")
TEXTS = ["good movie", "the book was very bad", "it"]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and adapters of three classes each under the page's names, and what its command writes."""
    folder = tmp_path_factory.mktemp("desk")
    bert = tiny_models.bert(folder / "minilm")
    for number, name in enumerate(NAMES):
        save_classifier(bert, folder / "customers" / name, number, 3)
    words = COMMANDS.splitlines()[-1].split()
    subprocess.run([sys.executable, "-m", "dvora.cli", *words[1:]], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def bert(desk: Path) -> Path:
    return desk / "minilm"


@pytest.fixture(scope="module")
def classifiers(desk: Path) -> Path:
    return desk / "customers"


@pytest.fixture(scope="module")
def exported(desk: Path) -> Path:
    return desk / "phone"


def method_of(folder: Path) -> "Method":
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(folder / "one.pte").load_method("forward")
    assert method is not None
    return method


def tensors_of(bert: Path, texts: list[str]) -> list[torch.Tensor]:
    """In the order and the dtypes that the layout says."""
    dtypes = {"attention_mask": torch.bool, "token_type_ids": torch.int32}
    inputs = {name: torch.from_numpy(values) for name, values in inputs_of(bert, texts).items()}
    return [tensor.to(dtypes.get(name, torch.int64)) for name, tensor in inputs.items()]


@pytest.mark.parametrize("texts", [TEXTS, TEXTS[2:], TEXTS[:2] * 4], ids=len)
def test_an_adapter_a_call(texts: list[str], exported: Path, bert: Path, classifiers: Path) -> None:
    method = method_of(exported)
    for name in NAMES:
        logits = method.execute([torch.from_numpy(vector(exported, name)), *tensors_of(bert, texts)])[0]
        np.testing.assert_allclose(logits.numpy(), logits_of(bert, classifiers / name, texts), atol=1e-4)


def test_the_program_on_the_page(desk: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM], cwd=desk, check=True, capture_output=True, text=True)
    assert "tensor([[" in ended.stdout


def test_more_rows_than_memory_is_planned_for(exported: Path, bert: Path) -> None:
    with pytest.raises(RuntimeError):
        method_of(exported).execute([torch.from_numpy(vector(exported, "films")), *tensors_of(bert, TEXTS * 3)])


def test_inputs_in_another_order_are_refused(exported: Path, bert: Path) -> None:
    """In PyTorch all are int64, and each is an input of the others' shape."""
    ids, mask = tensors_of(bert, TEXTS)
    adapter = torch.from_numpy(vector(exported, "films"))
    for inputs in ([mask, ids], [ids, mask.long()]):
        with pytest.raises(RuntimeError):
            method_of(exported).execute([adapter, *inputs])
    described = json.loads((exported / "layout.json").read_text())["inputs"]
    assert [(one["name"], one["dtype"]) for one in described] == [("input_ids", "int64"), ("attention_mask", "bool")]


def test_the_adapters_are_those_of_onnx(exported: Path, bert: Path, classifiers: Path, tmp_path: Path) -> None:
    export(classifiers, tmp_path / "onnx", "onnx", str(bert))
    layout, of_onnx = (json.loads((folder / "layout.json").read_text()) for folder in (exported, tmp_path / "onnx"))
    program = layout.pop("graphs")["one"]
    assert (program["file"], program["at_most"]) == ("one.pte", {"rows": 8, "tokens": 32})
    assert program["adapter_inputs"] == of_onnx.pop("graphs")["one"]["adapter_inputs"]
    # Their dtypes are others.
    names, of_others = ([one["name"] for one in described.pop("inputs")] for described in (layout, of_onnx))
    assert names == of_others
    assert layout == of_onnx
    digest = layout["digest"]
    for name in ("films", "shop", "news", "null"):
        with safe_open(exported / "adapters" / f"{name}.safetensors", "np") as file:
            assert file.metadata()["layout"] == digest
        np.testing.assert_array_equal(vector(exported, name), vector(tmp_path / "onnx", name))


def test_pixels(tmp_path: Path) -> None:
    vit = tiny_models.vit(tmp_path / "vit")
    save_trained(vit, tmp_path / "adapters" / "a", 1)
    values = export(tmp_path / "adapters", tmp_path / "exported", "executorch", str(vit))
    assert values["differences"]["one.pte"] < 1e-4


def test_structured_matrices(tmp_path: Path) -> None:
    """Their products view what attention gives, which fused attention, taken apart, gives with other strides."""
    bert = tiny_models.bert(tmp_path / "bert")
    BertModel(BertConfig.from_pretrained(bert, hidden_size=192, num_hidden_layers=1)).save_pretrained(bert)
    save_trained(bert, tmp_path / "adapters" / "a", 1, rank=96)
    values = export(tmp_path / "adapters", tmp_path / "exported", "executorch", str(bert))
    assert values["differences"]["one.pte"] < 1e-4


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (lambda _, x: torch.linalg.qr(x)[0], "cannot lower it: .*linalg_qr.*--to onnx"),
        (lambda _, x: torch.sort(x)[0], "does not execute its program: [^;]*aten::sort.values.*--to onnx"),
        # ExecuTorch 1.5 loses a bias that is used in its layer and outside of it.
        (lambda layer, x: layer(x) + layer.bias, "crashed .*SIGSEGV.*--to onnx"),
        (lambda _, x: x + torch.compiler.is_exporting(), "one.pte differs from PyTorch by 1 "),
    ],
    ids=["not lowered", "no kernel", "a crash", "other outputs"],
)
def test_the_error_says_what_executorch_cannot_do(
    operation: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor], message: str, tmp_path: Path
) -> None:
    from dvora.export.executorch import to_executorch
    from dvora.export.verified import sample_of_encoder

    def call(model: Any, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return (operation(model.encoder.layer[0].attention.self.key, model.get_input_embeddings()(tensors[0])),)

    bert = tiny_models.bert(tmp_path / "bert")
    save_trained(bert, tmp_path / "a", 1)
    inputs = {name: torch.from_numpy(values) for name, values in inputs_of(bert, TEXTS).items()}
    sample = replace(sample_of_encoder(inputs, "last_hidden_state"), call=call)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        to_executorch(AutoModel.from_pretrained(bert), {"a": tmp_path / "a"}, sample, tmp_path)


def test_what_is_refused_leaves_nothing(bert: Path, classifiers: Path, tmp_path: Path) -> None:
    output = tmp_path / "exported"
    with pytest.raises(ValueError, match="int8"):
        export(classifiers, output, "executorch", str(bert), int8=True)
    for texts in (TEXTS * 3, ["good " * 32, "it"]):
        with pytest.raises(ValueError, match=r"at most 8 of 32|expected 1 to 32"):
            export(classifiers, output, "executorch", str(bert), texts=texts)
    llama = tiny_models.llama(tmp_path / "llama")
    save_trained(llama, tmp_path / "writers" / "a", 1, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="cache"):
        export(tmp_path / "writers", output, "executorch", str(llama))
    assert not output.exists()
    assert not list(tmp_path.glob(".*"))
