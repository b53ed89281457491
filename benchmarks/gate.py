"""The gate of the rebuilt core: every figure that it must reach, measured the same way before and after.

By public interfaces only, so that it runs on any version of the library. From the repository's root, on today's code
and on an earlier worktree; each run replaces the rows of its label and parts in the result file, and shows all:

    python -m benchmarks.gate --label after
    PYTHONPATH=../before/src python -m benchmarks.gate --label before --part steps host

A step is a forward pass, then the gradients of the input and of all trained parameters, which count as written before
every step. Times are ratios within a turn in which all methods run, medians with quartiles. Kernels are operations that
PyTorch runs which are neither views nor fresh memory, forward and backward. "dense" is `"kaiming_uniform"`.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BertConfig, BertModel

import dvora
from benchmarks.environment import environment, machine
from benchmarks.speed.arms import BASE, Arm, adapted, sharing_copy
from benchmarks.speed.metrics import exactly
from benchmarks.speed.steps import CACHED_TOKENS, decode_step, prefill_step, training_step
from benchmarks.speed.timing import Spread, Step, interleaved, ratios, spread
from benchmarks.speed.workloads import NO_DROPOUT, Workload, last_hidden_state, llama, random

RESULT = Path(__file__).parent / "results" / "gate.json"
PACKAGE = Path(dvora.__file__).parent
LABELS = ("before", "after")
THREADS = 2
COMPILE_SECONDS = 600
LORA = Arm("LoRA", 1)
vera, structured, dense = (partial(Arm, method) for method in ("VeRA", "dvora structured", "dvora dense"))
COMPILED = (LORA, vera(256), structured(256), dense(256))
BY_BLOCK = "seconds to compile by block"
GATHERS = {"index", "index_select", "gather", "embedding", "take", "take_along_dim"}


class Figure(NamedTuple):
    """One line of the table: median and quartiles (None if not measured), at most what they may be, and details."""

    measure: str
    value: Spread | None
    limit: float | None = None
    more: dict[str, Any] | None = None


Figures = Iterator[Figure]


def timed(measure: str, first: Sequence[float], second: Sequence[float], limit: float | None = None) -> Figure:
    """The ratio of seconds in the same turns; beside it that of the fastest turns, which other work disturbs least."""
    return Figure(measure, spread(ratios(first, second)), limit, {"of_fastest": min(first) / min(second)})


def bert(width: int, blocks: int = 6) -> Workload:
    """The tower of the prototypes: six adapted layers a block, of three shapes; query, key and value share an input."""
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 32}

    def build() -> nn.Module:
        torch.manual_seed(0)
        config = BertConfig(vocab_size=8, num_hidden_layers=blocks, **sizes, **NO_DROPOUT)
        return BertModel(config, add_pooling_layer=False)

    return Workload(f"BERT {width}", width, ("query", "key", "value", "dense"), build, last_hidden_state)


def chain(width: int, layers: int) -> Workload:
    """Square layers one after another: one shape, no shared inputs."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        blocks = ({"linear": nn.Linear(width, width), "tanh": nn.Tanh()} for _ in range(layers))
        return nn.Sequential(*(nn.Sequential(OrderedDict(block)) for block in blocks))

    return Workload(f"chain {width}", width, ("linear",), build, lambda model, x: model(x))


def training_steps(workload: Workload, arms: Sequence[Arm], batch: int, length: int) -> dict[Arm, Step]:
    """Of the frozen base, and of every method on its weights."""
    base, x = workload.frozen(torch.float32), workload.inputs(batch, length, torch.float32)
    return {arm: training_step(workload, adapted(base, arm, workload.targets), x) for arm in (BASE, *arms)}


def steps(quick: bool) -> Figures:
    """Training steps beside LoRA r=1 and VeRA."""
    limits = {(384, 16): 1.2, (384, 64): 1.08, (1024, 16): 1.12, (1024, 64): 1.08}
    for (width, batch), at_most in limits.items():
        pairs = [(structured(64), LORA, at_most), (dense(64), LORA, at_most)]
        if (width, batch) == (1024, 16):
            pairs += [(structured(256), vera(256), 0.9), (dense(256), vera(256), 0.9)]
            pairs += [(structured(1024), vera(1024), 0.65)]
        arms = list(dict.fromkeys(arm for first, second, _ in pairs for arm in (second, first)))
        workload = bert(width, 1 if quick else 6)
        calls = training_steps(workload, arms, batch, 32)
        seconds, _ = interleaved(calls, 3 if quick else 9, warm_ups=1, at_least=0.1)
        for arm, beside, limit in [*((arm, BASE, None) for arm in arms), *pairs]:
            measure = f"{workload.name}, {batch} x 32 tokens: {arm.name} to {beside.name}"
            yield timed(measure, seconds[arm], seconds[beside], limit)


def memory(quick: bool) -> Figures:
    """What a forward pass leaves for the backward pass: live tensors, wherever they are kept, without the output.

    An input's z is kept once: query, key and value share theirs. What is made once and not in every step is a constant.
    """
    batch, length, blocks = 64, 32, 2
    for width in (384,) if quick else (384, 1024):
        workload, left = bert(width, blocks), {}
        base, x = workload.frozen(torch.float32), workload.inputs(batch, length, torch.float32).requires_grad_()
        for arm in (BASE, LORA, structured(64), dense(64)):
            model = adapted(base, arm, workload.targets)
            step = training_step(workload, model, x)
            step()
            with Watching() as watching:
                step()
                model.zero_grad()
                output = workload.output(model, x)
                left[arm] = watching.bytes(besides=[x, output, *model.parameters(), *model.buffers()])
        for arm in (structured(64), dense(64)):
            z = 4 * blocks * batch * length * arm.rank * 4
            more = {"bytes": left[arm], "z_bytes": z, "lora_bytes": left[LORA], "base_bytes": left[BASE]}
            measure = f"{workload.name}, {batch} x {length} tokens: kept by {arm.name} without z, to {LORA.name}"
            yield Figure(measure, exactly((left[arm] - z) / left[LORA]), 1, more)


class Watching(TorchDispatchMode):
    """The kernels of what runs in it, and the tensors that operations return.

    A backward pass is seen too: on the CPU it runs in the thread that asks for it.
    """

    MEMORY = ("empty", "new_empty", "_unsafe_view", "_reshape_alias", "resize_", "set_", "detach_", "as_strided_")

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[str] = []
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        is_view = any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns)
        if not is_view and not name.startswith(self.MEMORY):
            self.kernels.append(name)
        result = func(*args, **(kwargs or {}))
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)):
            self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def bytes(self, besides: Iterable[Tensor]) -> int:
        """Of those that are alive."""
        others = {tensor.untyped_storage()._cdata for tensor in besides}
        alive = {key: size for key, (weak, size) in self.storages.items() if not weak.expired()}
        return sum(size for key, size in alive.items() if key not in others)


def kernels_of(call: Step) -> list[str]:
    """In the second call."""
    call()
    with Watching() as watching:
        call()
    return watching.kernels


def kernels(quick: bool) -> Figures:
    """Kernels beyond the base's: a layer, which is the slope over models of two and six blocks, and a shape."""
    for make, layers, shapes in ((chain, 1, 1), (bert, 6, 3)):
        for arm in (LORA, vera(64), structured(64), dense(64)):
            few, many = (_beyond_base(make(256, blocks), arm, 32, 32) for blocks in (2, 6))
            limits = (9, 60) if arm.method.startswith("dvora") else (None, None)
            setting = f"{make(256, 1).name}, 1,024 tokens, {arm.name}"
            yield Figure(f"kernels a layer, {setting}", exactly((many - few) / 4 / layers), limits[0])
            yield Figure(f"kernels a shape, {setting}", exactly((3 * few - many) / 2 / shapes), limits[1])
    blocks, rank = (1, 16) if quick else (8, 256)
    workload = llama(64, 176, 4) if quick else llama(1024, 2816, 16, blocks)
    for arm, limit in ((LORA, None), (vera(rank), None), (structured(rank), 30), (dense(rank), 20)):
        a_layer = _beyond_base(workload, arm, 1, 8) / (7 * blocks)
        yield Figure(f"kernels a layer, {workload.name}, 8 tokens, {arm.name}", exactly(a_layer), limit)


def _beyond_base(workload: Workload, arm: Arm, batch: int, length: int) -> int:
    steps_of = training_steps(workload, [arm], batch, length)
    return len(kernels_of(steps_of[arm])) - len(kernels_of(steps_of[BASE]))


def host(quick: bool) -> Figures:
    """The host's time beyond the base's beside VeRA's, in a model so small that kernels cost little, on one thread."""
    rank = 16
    torch.set_num_threads(1)
    for batch, length, at_most in ((1, 8, 2.5), (8, 32, 1.5)):
        arms = {LORA: None, structured(rank): at_most, dense(rank): at_most}
        calls = training_steps(llama(64, 176, 4, 8), [vera(rank), *arms], batch, length)
        seconds, _ = interleaved(calls, 3 if quick else 41, warm_ups=2, at_least=0.05)
        beyond = {arm: [a - b for a, b in zip(seconds[arm], seconds[BASE], strict=True)] for arm in calls}
        fastest = {arm: min(seconds[arm]) - min(seconds[BASE]) for arm in calls}
        for arm, limit in arms.items():
            measure = f"host time beyond the base's, {batch * length} tokens: {arm.name} to {vera(rank).name}"
            more = {"of_fastest": fastest[arm] / fastest[vera(rank)]}
            yield Figure(measure, spread(ratios(beyond[arm], beyond[vera(rank)])), limit, more)
    torch.set_num_threads(THREADS)


def bank(quick: bool) -> Figures:
    """A batch whose rows have an adapter each, beside the base, without gradients, at the width of MiniLM."""
    workload = bert(384, 1 if quick else 6)
    base, step_of = _bank(workload, 64)
    for batch, length, limit in ((8, 16, 1.45), (64, 32, 1.4)):
        x = workload.inputs(batch, length, torch.float32)
        by_base, by_bank = prefill_step(workload, base, x), step_of(x)
        calls = {"base": by_base, "bank": by_bank}
        seconds, _ = interleaved(calls, 5 if quick else 61, warm_ups=3, at_least=0.05)
        setting = f"bank r=64, {batch} x {length} tokens, {batch} adapters"
        yield timed(f"{setting}: to the base", seconds["bank"], seconds["base"], limit)
        gathers = [sum(name in GATHERS for name in kernels_of(step)) for step in (by_bank, by_base)]
        yield Figure(f"{setting}: gathers a batch", exactly(gathers[0] - gathers[1]), 1)


def _bank(workload: Workload, count: int) -> tuple[nn.Module, Callable[[Tensor], Step]]:
    """The base, and what makes a step whose rows have an adapter each."""
    base = workload.frozen(torch.float32).eval()
    model, served = adapted(base, structured(64), workload.targets), sharing_copy(base)
    vector = dvora.flat.Layout.of(model).to_vector(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        adapters = dvora.AdapterBank(served, like=folder)
    for number in range(count):
        adapters.add(str(number), vector + 0.01 * random(len(vector), seed=number))

    def step_of(x: Tensor) -> Step:
        names, forward = [str(number) for number in range(len(x))], prefill_step(workload, served, x)

        def step() -> None:
            with adapters.rows(names):
                forward()

        return step

    return base, step_of


def accepted(quick: bool) -> Figures:
    """What may be slower than before: a token without merging by 15 %, a step in bfloat16 by 30 %."""
    workload = llama(64, 176, 4) if quick else llama(1024, 2816, 16)
    for dtype, limits in ((torch.float32, (1.39, 1.61)), (torch.bfloat16, (1.94, 2.34))):
        base = workload.frozen(dtype)
        decodes = dtype == torch.float32
        x = workload.inputs(1, CACHED_TOKENS + 1 if decodes else 512, dtype)
        arms = {arm: adapted(base, arm, workload.targets) for arm in (BASE, structured(256), dense(256))}
        calls = {
            arm: decode_step(model, x) if decodes else training_step(workload, model, x) for arm, model in arms.items()
        }
        seconds, _ = interleaved(calls, 3 if quick else 15, warm_ups=2, at_least=0.1)
        for arm, limit in zip(list(arms)[1:], limits, strict=True):
            what = "one token" if decodes else "bfloat16, a step of 512 tokens"
            yield timed(f"{workload.name}, {what}: {arm.name} to base", seconds[arm], seconds[BASE], limit)


def files(quick: bool) -> Figures:
    """Files of the package in which some function runs, in calls that are warmed up."""
    workload = bert(64, 2)
    x, base = workload.inputs(4, 32, torch.float32), workload.frozen(torch.float32)
    model = adapted(base, structured(16), workload.targets)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        calls: tuple[tuple[str, Callable[[], Step], int], ...] = (
            ("training step", lambda: training_step(workload, model, x), 8),
            ("evaluation", lambda: prefill_step(workload, model, x), 7),
            ("batch of the bank", lambda: _bank(workload, len(x))[1](x), 9),
            ("load", lambda: lambda: PeftModel.from_pretrained(sharing_copy(base), folder), 12),
        )
        for name, make, limit in calls:
            call = make()
            call(), call()
            names = _files_of(call)
            yield Figure(f"files that run: {name}", exactly(len(names)), limit, {"files": names})


def _files_of(call: Step) -> list[str]:
    paths: set[Path] = set()
    sys.setprofile(lambda frame, event, argument: paths.add(Path(frame.f_code.co_filename)))
    call()
    sys.setprofile(None)
    return sorted(path.relative_to(PACKAGE).as_posix() for path in paths if path.is_relative_to(PACKAGE))


def compile_(quick: bool) -> Figures:
    """`torch.compile` beside eager, each method in a process of its own, with an empty cache and a time limit."""
    for model, arm in product(("llama", "BERT"), COMPILED):
        of = f"{model}, 512 tokens, {arm.name}"
        for measured, what in ((_compile_whole, "compiled to eager"), (_compile_by_block, BY_BLOCK)):
            measure = f"{what}, {of}"
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                try:
                    figures = pool.apply_async(measured, (measure, model, arm, quick)).get(COMPILE_SECONDS)
                except Exception as error:
                    figures = [Figure(measure, None, None, {"failure": f"{type(error).__name__} {error!s:.300}"})]
            yield from figures


def _compile_workload(model: str, quick: bool) -> tuple[Workload, nn.Module, Tensor]:
    """What is compiled, its base and its input, in a process of their own."""
    torch.set_num_threads(THREADS)
    workload = bert(384) if model == "BERT" else llama(64, 176, 4) if quick else llama(1024, 2816, 16)
    return workload, workload.frozen(torch.float32), workload.inputs(16, 32, torch.float32)


def _compile_whole(measure: str, model: str, arm: Arm, quick: bool) -> list[Figure]:
    """In its own process. All of the first step is counted as compiling."""
    workload, base, x = _compile_workload(model, quick)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        eager = training_step(workload, adapted(base, arm, workload.targets), x)
        start = perf_counter()
        step = training_step(workload, adapted(base, arm._replace(compiled=True), workload.targets), x)
        step()
        to_compile = exactly(perf_counter() - start)
        calls = {"eager": eager, "compiled": step}
        seconds, _ = interleaved(calls, 3 if quick else 15, warm_ups=2, at_least=0.1)
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    more = {"eager_seconds": spread(seconds["eager"]).median, "graph_breaks": breaks}
    in_seconds = Figure(measure.replace("compiled to eager", "seconds to compile"), to_compile, None, more)
    return [timed(measure, seconds["compiled"], seconds["eager"]), in_seconds]


def _compile_by_block(measure: str, model: str, arm: Arm, quick: bool) -> list[Figure]:
    """The seconds if each block is compiled by itself, as PyTorch recommends for large models: all share one graph."""
    workload, base, x = _compile_workload(model, quick)
    adapted_model = adapted(base, arm, workload.targets)
    blocks = next(module for module in adapted_model.modules() if isinstance(module, nn.ModuleList))
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        start = perf_counter()
        for block in blocks:
            block.compile()
        training_step(workload, adapted_model, x)()
        seconds = exactly(perf_counter() - start)
    more = {"blocks": len(blocks), "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"]}
    return [Figure(measure, seconds, None, more)]


PARTS = {part.__name__.strip("_"): part for part in (steps, memory, kernels, host, bank, accepted, files, compile_)}


def commit() -> str:
    """Of the library that is measured, with a plus if its sources were changed since."""
    git = partial(subprocess.check_output, cwd=PACKAGE, text=True)
    changed = git(["git", "status", "--porcelain", "--", "."]).strip()
    return git(["git", "rev-parse", "--short", "HEAD"]).strip() + ("+" if changed else "")


def cell(row: dict[str, Any] | None) -> str:
    if row is None or row["median"] is None:
        return "" if row is None else str(row["failure"])
    missed = " missed" if row["limit"] is not None and row["median"] > row["limit"] else ""
    quartiles = "" if row["low"] == row["high"] else f" ({row['low']:.3g} to {row['high']:.3g})"
    fastest = f", fastest {row['of_fastest']:.3g}" if "of_fastest" in row else ""
    return f"{row['median']:.3g}{quartiles}{fastest}{missed}"


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The limit beside the figures of both labels."""
    by_label = {(row["measure"], row["label"]): row for row in rows}
    print(f"{'measure':<82}{'limit':<7}{LABELS[0]:<45}{LABELS[1]}")
    for measure, limit in {row["measure"]: row["limit"] or "" for row in rows}.items():
        print(f"{measure:<82}{limit:<7}" + "".join(f"{cell(by_label.get((measure, label))):<45}" for label in LABELS))


def page(content: dict[str, Any]) -> str:
    """The same as a table of the documentation: what has a limit, before and after, medians."""
    by_label = {(row["measure"], row["label"]): row for row in content["rows"]}
    lines = ["| measure | at most | before | now |", "|---|---|---|---|"]
    for row in content["rows"]:
        if row["label"] == LABELS[1] and row["limit"] is not None:
            before = by_label.get((row["measure"], LABELS[0]), {}).get("median")
            figures = ("" if value is None else f"{value:.3g}" for value in (before, row["median"]))
            lines.append(f"| {row['measure']} | {row['limit']:g} | {' | '.join(figures)} |")
    found = content["environment"][LABELS[1]]
    versions = f"torch {found['torch']}, PEFT {found['peft']}, CPU, {THREADS} threads"
    return "\n".join(
        [*lines, "", f"Medians of ratios in one run each (`benchmarks/results/gate.json`; {versions}).", ""]
    )


def compiling(content: dict[str, Any]) -> str:
    """What `torch.compile` takes and gives, as a table of the documentation."""
    medians = {row["measure"]: row["median"] for row in content["rows"] if row["label"] == LABELS[1]}
    arms = [arm.name for arm in COMPILED]
    lines = ["| | " + " | ".join(arms) + " |", "|---|" + "---|" * len(arms)]
    kinds = {
        "seconds to compile the model": "seconds to compile",
        "... block by block": BY_BLOCK,
        "a compiled step, eager = 1": "compiled to eager",
    }
    for model, name in {"BERT": "BERT of six blocks", "llama": "a Llama block"}.items():
        for label, kind in kinds.items():
            found = [medians.get(f"{kind}, {model}, 512 tokens, {arm}") for arm in arms]
            lines.append(f"| {name}: {label} | " + " | ".join("" if v is None else f"{v:.3g}" for v in found) + " |")
    return "\n".join([*lines, "", "Medians (`benchmarks/results/gate.json`), with an empty cache.", ""])


def main(arguments: list[str] | None = None) -> int:
    """Measure, replace the rows of this label and these parts in the result file, and show all of them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gate", description=main.__doc__)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="all, if none is named")
    parser.add_argument("--label", choices=LABELS, default="after", help="of the rows")
    parser.add_argument("--quick", action="store_true", help="tiny models, few turns, no result file")
    chosen = parser.parse_args(arguments)
    if (chosen.label == LABELS[0]) == PACKAGE.is_relative_to(Path(__file__).parent.parent):
        # A worktree that is gone from PYTHONPATH leaves the installed library, without a word.
        parser.error(f"--label {chosen.label} would measure {PACKAGE}")
    torch.set_num_threads(THREADS)
    content: dict[str, Any] = {"environment": {}, "rows": []}
    for part in chosen.part:
        where = {"label": chosen.label, "part": part, "commit": commit(), "machine": machine()}
        rows = []
        for measure, value, limit, more in PARTS[part](chosen.quick):
            numbers = {name: value and float(f"{getattr(value, name):.4g}") for name in Spread._fields}
            rows.append({**where, "measure": measure, "limit": limit, **numbers, **(more or {})})
            print(f"{measure}: {cell(rows[-1])}", flush=True)
        if RESULT.exists() and not chosen.quick:
            # Only now: a run of the other label may have written meanwhile.
            content = json.loads(RESULT.read_text(encoding="utf-8"))
        others = [row for row in content["rows"] if (row["label"], row["part"]) != (chosen.label, part)]
        content["rows"] = others + rows
        content["environment"][chosen.label] = environment()
        if not chosen.quick:
            RESULT.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    show(content["rows"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
