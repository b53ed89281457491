"""A merged adapter in llama.cpp answers as in PyTorch: the page's commands, by `make gguf`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dvora
from materials.files import lay_out

llama = pytest.importorskip("llama_cpp_py_sync", reason="llama.cpp is not installed; `make gguf` runs this")

PAGE = Path(dvora.__file__).parents[2] / "docs" / "how-to" / "export-merged.md"
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
PROMPTS = ("Lear. So young, and", "Fool. Nuncle,", "Blow, winds, and", "The king is", "My lord,", "What is the matter?")
TOKENS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the page's commands ran."""
    folder = tmp_path_factory.mktemp("page")
    lay_out(folder)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for block in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        script = "\n".join(line for line in block.splitlines() if not line.startswith("pip install"))
        command = ["bash", "-ec", script]
        ended = subprocess.run(command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True)
        assert ended.returncode == 0, (block, ended.stdout, ended.stderr)
    return folder


def in_pytorch(model_folder: Path) -> list[str]:
    """Greedy answers."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    answers = []
    for prompt in PROMPTS:
        asked = tokenizer(prompt, return_tensors="pt")
        made = model.generate(**asked, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
        answers.append(tokenizer.decode(made[0, asked["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


def in_llama_cpp(file: Path) -> list[str]:
    """Greedy answers."""
    with llama.Llama(str(file), type_k="f32", type_v="f32", n_threads=1) as model:
        return [model.generate(p, max_tokens=TOKENS, temperature=0, repeat_penalty=1) for p in PROMPTS]


@pytest.mark.parametrize("file", ["play.gguf", "play-f16.gguf"])
def test_greedy_answers_are_those_of_the_merged_model(folder: Path, file: str) -> None:
    assert in_llama_cpp(folder / file) == in_pytorch(folder / "merged")


def test_the_adapter_is_in_the_answers(folder: Path) -> None:
    assert in_llama_cpp(folder / "play.gguf") != in_pytorch(folder / "smollm2")
