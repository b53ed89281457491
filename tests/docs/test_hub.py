"""Adapters on a hub: huggingface_hub's own client, PEFT as it is, and the page about it, against a stand-in."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from peft import get_peft_model

from dvora import DVoRAConfig
from tests.docs.hub import TOKEN, Hub, running_hub
from tests.peft.tiny import bert
from tests.recipes.finished_runs import finished

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "how-to" / "hub.md"
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)

IN_PYTHON = """
from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

try:
    PeftConfig.from_pretrained("you/saved-before")
except KeyError as error:
    assert str(error) == "'DVORA'", error
else:
    raise SystemExit("PEFT knows the method")
import sys
import dvora
assert isinstance(PeftConfig.from_pretrained("you/saved-before"), dvora.DVoRAConfig)
assert "DVORA" in PEFT_TYPE_TO_TUNER_MAPPING
assert not any("PeftFinder" in repr(finder) for finder in sys.meta_path)

import torch
from tests.peft.tiny import bert, outputs, train_vectors

def adapted():
    model = get_peft_model(bert(), dvora.DVoRAConfig(r=4, target_modules=["query"]))
    train_vectors(model)
    return model.eval()

model = adapted()
model.push_to_hub("you/pushed")
loaded = PeftModel.from_pretrained(bert(), "you/pushed")
assert torch.equal(outputs(loaded.eval()), outputs(model))
loaded.load_adapter("you/pushed", "second")
loaded.set_adapter("second")
assert torch.equal(outputs(loaded.eval()), outputs(model))

# A repository with a card.
from huggingface_hub import create_repo, upload_folder

model.save_pretrained("saved")
create_repo("you/saved")
first = upload_folder(repo_id="you/saved", folder_path="saved").oid
with torch.no_grad():
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.mul_(1.1)
model.push_to_hub("you/saved")
now, before = (PeftModel.from_pretrained(bert(), "you/saved", revision=name).eval() for name in ("main", first))
assert torch.equal(outputs(now), outputs(model))
assert torch.equal(outputs(before), outputs(adapted()))
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


def environment(hub: Hub, folder: Path) -> dict[str, str]:
    """Of processes for which the stand-in is the hub, with their cache in the folder, and the commands on the path."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    # The client's command is there wherever its package is.
    for name, code in (("dvora", "-m dvora.cli"), ("hf", "-m huggingface_hub.cli.hf")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {code} "$@"\n')
        (programs / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(folder / "cache"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    }


def run(hub: Hub, folder: Path, code: str, kind: str = "python") -> subprocess.CompletedProcess[str]:
    command = ["bash", "-ec", code] if kind == "sh" else [sys.executable, "-c", code]
    ended = subprocess.run(
        command, cwd=folder, env=environment(hub, folder), capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, (code, ended.stdout, ended.stderr)
    return ended


def on_disk(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_the_page(hub: Hub, tmp_path: Path) -> None:
    trained = finished("text-classification", tmp_path)
    shutil.copytree(trained.folder, tmp_path / "runs" / "reviews")
    shutil.copytree(trained.settings.model, tmp_path / "minilm")
    blocks = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    for line in "".join(block for kind, block in blocks if kind == "sh").splitlines():
        before = len(hub.requests)
        run(hub, tmp_path, line, "sh")
        # Nothing is fetched unless the user asks for it.
        assert (len(hub.requests) == before) == line.startswith("dvora "), line
    run(hub, tmp_path, "".join(block for kind, block in blocks if kind == "python"))
    adapter = on_disk(tmp_path / "runs" / "reviews" / "adapter")
    assert set(adapter) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert hub.files("you/films") == adapter
    assert on_disk(tmp_path / "films") == adapter
    in_python = hub.files("you/films-in-python")
    assert in_python["adapter_model.safetensors"] == adapter["adapter_model.safetensors"]
    for name, library in (("you/films", "dvora"), ("you/films-in-python", "peft")):
        info = HfApi(hub.address, token=False).model_info(name)
        assert info.library_name == library
        assert "dvora" in info.tags
        assert "license" not in hub.card(name)
        assert b"import dvora" in hub.files(name)["README.md"]


def test_peft_knows_the_method_by_the_import_pushes_loads_by_name_and_keeps_the_card(hub: Hub, tmp_path: Path) -> None:
    get_peft_model(bert(), DVoRAConfig(r=4, target_modules=["query"])).save_pretrained(tmp_path / "before")
    hub.repositories["you/saved-before"] = {"0" * 40: on_disk(tmp_path / "before")}
    run(hub, tmp_path, IN_PYTHON)
    assert {"adapter_config.json", "adapter_model.safetensors"} < set(hub.files("you/pushed"))
    # What the page warns of; where it is no longer so, the page can say less.
    assert hub.card("you/pushed")["library_name"] == "transformers"
    assert hub.files("you/saved")["README.md"] == (tmp_path / "saved" / "README.md").read_bytes()
    assert len(hub.repositories["you/saved"]) == 2
