"""`dvora convert`: an adapter of one method as one of another."""

from typing import Annotated

import typer

from ..recipes.adapters import TARGETS, TO_LORA
from .errors import check_there
from .options import AnAdapter, Base, NewFolder, command
from .output import Output


def _target(to: str) -> str:
    if to not in TARGETS:
        raise typer.BadParameter(TO_LORA if to == "lora" else f"{to!r} is none of {', '.join(TARGETS)}")
    return to


@command
def convert(
    adapter: AnAdapter,
    to: Annotated[str, typer.Option(help="dora (from dvora) or dvora (from PEFT's vera).", callback=_target)],
    output: NewFolder,
    shown: Output,
    model: Base = None,
) -> None:
    """Convert an adapter where that is exact: DVoRA to PEFT's DoRA, PEFT's VeRA to DVoRA.

    To LoRA it is not, and refused: DVoRA rescales rows of the weight, which no low rank can.

    Examples:

    \b
    dvora convert adapter --to dora --output as-dora
    dvora convert vera-adapter --to dvora --output as-dvora --model base
    """
    check_there(adapter)
    from ..recipes.adapters import conversion

    shown.result(conversion.convert(adapter, to, output, model), f"Converted adapter in {output}")
    shown.next_step("dvora", "inspect", str(output))
