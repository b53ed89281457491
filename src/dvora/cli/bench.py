"""`dvora bench`: step times and kernels of several methods on a given model."""

from dataclasses import asdict
from itertools import count
from typing import Annotated

import typer

from .errors import UsageError, one_line
from .output import Debug, Json, Output, Quiet

LEGEND = {
    "seconds": "medians over the rounds",
    "ratio": "time over the base model's in the same round, median; spread: its quartiles",
    "kernels": "operations a layer beyond the base model's; at few tokens it is launching them that takes the time",
}
EXAMPLES = """[bold]Examples[/bold]

    dvora bench base --rounds 3

    dvora bench base --rank 64 --tokens 32 --methods lora,dvora --rounds 3 --threads 1
"""
DTYPES = ("auto", "float32", "bfloat16", "float16")


def bench_command(
    model: Annotated[str, typer.Argument(help="Folder of a model, or its name on the hub.")],
    targets: Annotated[
        str, typer.Option(help="Names of the layers to adapt, with commas.", show_default="all linear layers")
    ] = "",
    rank: Annotated[int, typer.Option(help="Rank of vera and dvora.", min=1)] = 256,
    low_rank: Annotated[int, typer.Option(help="Rank of lora and dora.", min=1)] = 16,
    methods: Annotated[
        str, typer.Option(help="Methods, with commas.", show_default="lora, dora, vera, dvora, dvora dense")
    ] = "",
    tokens: Annotated[int, typer.Option(help="Tokens of each row.", min=2)] = 128,
    batch: Annotated[int, typer.Option(help="Rows.", min=1)] = 1,
    rounds: Annotated[int, typer.Option(help="How often everything is timed.", min=1)] = 9,
    dtype: Annotated[str, typer.Option(help="auto (the model's own), float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda ...")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="Threads of torch.", show_default="its own choice", min=1)] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Time a training step and a decoded token (or a forward pass) of each method beside the base model.

    Methods take turns, and ratios to the base are medians over the rounds. The kernels that each starts are counted.
    """
    with one_line(debug):
        if dtype not in DTYPES:
            raise UsageError(f"unknown --dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
        shown = Output(as_json, quiet)
        import torch

        from ..recipes.adapters_at_rest.speed import CONFIGS, bench

        if threads is not None:
            torch.set_num_threads(threads)
        done = count(1)
        found = bench(
            model,
            targets=[name for name in targets.replace(" ", "").split(",") if name],
            rank=rank,
            low_rank=low_rank,
            methods=[name.strip() for name in methods.split(",") if name.strip()] or list(CONFIGS),
            tokens=tokens,
            batch=batch,
            rounds=rounds,
            dtype=dtype,
            device=device,
            on_round=lambda: shown.note(f"round {next(done)} of {2 * rounds}: every method once"),
        )
        shown.result(asdict(found), f"Times on {model}, as multiples of the base", LEGEND)
        shown.next_step("dvora", "count", model, why="what each method trains and saves")
