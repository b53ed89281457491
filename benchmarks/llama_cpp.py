"""A trained adapter, merged, in llama.cpp beside PyTorch: by the commands of docs/how-to/export-merged.md."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from llama_cpp_py_sync import Llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.results import Row

PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "export-merged.md"
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
PROMPTS = ("Lear. So young, and", "Fool. Nuncle,", "Blow, winds, and", "The king is", "My lord,", "What is the matter?")
TOKENS = 24


def run_page(folder: Path) -> None:
    """Run the page's commands in a folder with the documentation's inputs."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for block in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        script = "\n".join(line for line in block.splitlines() if not line.startswith("pip install"))
        subprocess.run(["bash", "-ec", script], cwd=folder, env=environment, check=True)


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
    with Llama(str(file), type_k="f32", type_v="f32", n_threads=1) as model:
        return [model.generate(p, max_tokens=TOKENS, temperature=0, repeat_penalty=1) for p in PROMPTS]


def measured(folder: Path) -> Row:
    """Greedy answers of both files that are PyTorch's, and what another adapter costs: loading another file."""
    expected = in_pytorch(folder / "merged")
    equal, bytes_of, load_ms = {}, {}, {}
    for kind, file in (("f32", folder / "play.gguf"), ("f16", folder / "play-f16.gguf")):
        equal[kind] = sum(got == wanted for got, wanted in zip(in_llama_cpp(file), expected, strict=True))
        bytes_of[kind] = file.stat().st_size
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            Llama(str(file), n_threads=1).close()
            seconds.append(time.perf_counter() - started)
        load_ms[kind] = round(1000 * sorted(seconds)[2], 1)
    return {"bytes": bytes_of, "load_ms": load_ms, "equal_answers": equal, "answers": len(PROMPTS)}
