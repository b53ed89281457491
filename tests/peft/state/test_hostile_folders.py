"""Adapter folders made to take time or memory: each is refused or loaded within limits of both."""

import copy
import json
import resource
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from dvora import DVoRAConfig
from dvora.peft import expressions
from tests.fresh import FRESH
from tests.peft.state.adapter_files import CONFIG, WEIGHTS, edit_config, edit_weights
from tests.peft.tiny import train_vectors

MEMORY, SECONDS = 3 * 2**28, 5.0
"""Bytes that one load may add, and seconds of the processor that it may take."""
LAMBDA_D = "base_model.model.wide.dvora_lambda_d"


class Wide(nn.Module):
    """Wide enough that a rank of thousands takes gigabytes."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(2048, 2048)
        self.other = nn.Linear(2048, 8)
        self.head = nn.Linear(2048, 3)
        # Expressions take long for long names.
        self.a_name_of_forty_characters_and_some_more = nn.Identity()


def base() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Wide()


def settings(**values: object) -> Callable[[Path], object]:
    return lambda folder: edit_config(folder, **values)


def tensors(**values: Callable[[], Tensor]) -> Callable[[Path], object]:
    return lambda folder: edit_weights(folder, lambda held: held.update({k: v() for k, v in values.items()}))


def pickled(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        held = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        torch.save(change(held), folder / "adapter_model.bin")

    return edit


def several(*edits: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: [edit(folder) for edit in edits]


NAMES = [f"name{number}" for number in range(40_000)]
HOSTILE: dict[str, Callable[[Path], object]] = {
    "rank": settings(r=65536),
    "rank of a pattern": settings(rank_pattern={".*": 65536}),
    "rank of a layer that the file lacks": settings(
        r=65536, rank_pattern={"wide": 4}, target_modules=["wide", "other"]
    ),
    "rank and no vectors": several(settings(r=65536), tensors(), lambda f: edit_weights(f, dict.clear)),
    "expanded rank": several(settings(r=65536), pickled(lambda held: {**held, LAMBDA_D: torch.ones(1).expand(65536)})),
    "expanded magnitude": pickled(
        lambda held: {**held, LAMBDA_D.replace("lambda_d", "magnitude"): torch.ones(1).expand(2**32)}
    ),
    "expanded projections": pickled(
        lambda held: {**held, "base_model.dvora_projections.stream_0": torch.ones(1, 1).expand(65536, 65536)}
    ),
    "tall projections": tensors(**{"base_model.dvora_projections.stream_0": lambda: torch.ones(500_000, 1)}),
    "matrices of VeRA, inputs": settings(projection_init="peft_vera(r=4, in=33000000, out=33000000)"),
    "matrices of VeRA, rank": settings(projection_init="peft_vera(r=60000, in=2048, out=2048)"),
    "a head without columns": tensors(**{"base_model.model.head.weight": lambda: torch.ones(30_000_000, 0)}),
    "an expression": settings(exclude_modules="(.*)*x"),
    "an expression in a pattern": settings(rank_pattern={"(.+)+!": 4}),
    "sets of characters": settings(exclude_modules="[Ā-退]" * 40_000),
    "4,000 patterns": settings(alpha_pattern=dict.fromkeys(NAMES[:4000], 1.0)),
    "40,000 patterns": settings(alpha_pattern=dict.fromkeys(NAMES, 1.0)),
    "40,000 targets": settings(target_modules=[*NAMES, "wide"]),
    "4,000 targets": settings(target_modules=[*NAMES[:4000], "wide"]),
    "long targets": settings(target_modules=["q" * 2**20, "wide"]),
    "probes without end": settings(base_probes={"wide": [1.0] * 10**6}),
    "one token a million times": settings(trainable_token_indices={"head": [0] * 10**6}),
    "deep JSON": lambda folder: (folder / CONFIG).write_text('{"a":' * 10**6),
    "digits": lambda folder: (folder / CONFIG).write_text('{"r": ' + "9" * 10**6 + "}"),
}


def loads(folder: str, results: Any) -> None:
    """Load every hostile folder in this process, which has a limit of its memory."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    expressions.TIME_LIMIT = 0.3
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
    model = base()
    for name, edit in HOSTILE.items():
        hostile = Path(folder, "hostile")
        shutil.copytree(Path(folder, "sound"), hostile)
        edit(hostile)
        start = time.process_time()
        try:
            PeftModel.from_pretrained(copy.deepcopy(model), str(hostile))
            ended = "loaded"
        except Exception as error:
            ended = f"{type(error).__name__}: {error}"
        results.put((name, ended[:2000], len(ended), time.process_time() - start))
        shutil.rmtree(hostile)
    results.put(None)


def test_none_takes_much_time_or_memory(tmp_path: Path) -> None:
    model = get_peft_model(base(), DVoRAConfig(r=4, target_modules=["wide"], modules_to_save=["head"]))
    train_vectors(model)
    model.save_pretrained(tmp_path / "sound")
    assert len(json.loads((tmp_path / "sound" / CONFIG).read_text())["base_probes"]) == 1
    results = FRESH.Queue()
    process = FRESH.Process(target=loads, args=(str(tmp_path), results), daemon=True)
    process.start()
    found = {}
    try:
        while (each := results.get(timeout=60)) is not None:
            found[each[0]] = each[1:]
    finally:
        process.kill()
    assert found.keys() == HOSTILE.keys()
    refusals = ("loaded", "ValueError", "TypeError", "RecursionError", "JSONDecodeError", "NoMatchingPeftModuleError")
    assert not {name: ended for name, (ended, _, _) in found.items() if not ended.startswith(refusals)}
    assert not {name: length for name, (_, length, _) in found.items() if length > 3000}
    assert not {name: seconds for name, (_, _, seconds) in found.items() if seconds > SECONDS}
    assert {name for name, (ended, _, _) in found.items() if ended == "loaded"} == {
        *("4,000 patterns", "4,000 targets", "long targets"),
    }
