"""The models are the ones meant. The two that need a conversion are tried only where it has been made."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from materials import models
from materials.fetch import cache_folder


def skip_unless_cached(folder: str, loader: str) -> None:
    if not Path(cache_folder() / folder).is_dir():
        pytest.skip(f"not in the cache; materials.models.{loader}() would make it")


def test_minilm_tells_sentences_apart() -> None:
    folder = models.minilm()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    batch = tokenizer(["A cat sleeps.", "A kitten naps.", "Shares fell on Monday."], return_tensors="pt", padding=True)
    mask = batch["attention_mask"][:, :, None]
    with torch.no_grad():
        sentences = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    cat, kitten, shares = torch.nn.functional.normalize(sentences)
    assert cat @ kitten > 0.6 > 0.3 > cat @ shares


def test_smollm2_knows_a_capital() -> None:
    skip_unless_cached(models.SMOLLM2_FOLDER, "smollm2")
    folder = models.smollm2()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = tokenizer("The capital of Italy is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(answer[0]) == "The capital of Italy is Rome."


def test_vit_agrees_with_its_onnx_file() -> None:
    skip_unless_cached(models.VIT_FOLDER, "vit")
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    pixels = np.random.default_rng(0).standard_normal((1, 3, 224, 224), dtype=np.float32)
    graph = onnx.load(models.vit_onnx())
    last = "/backbone/layernorm/Add_1_output_0"
    graph.graph.output.append(onnx.helper.make_empty_tensor_value_info(last))
    (expected,) = onnxruntime.InferenceSession(graph.SerializeToString()).run([last], {"input_image": pixels})
    model = AutoModel.from_pretrained(models.vit()).eval()
    with torch.no_grad():
        result = model(torch.from_numpy(pixels)).last_hidden_state.numpy()
    assert np.abs(result - expected).max() < 1e-4
