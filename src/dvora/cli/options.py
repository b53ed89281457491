"""What makes a command of a function: the options that many have, and those that a pydantic model gives."""

from collections.abc import Callable, Sequence
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ..recipes.models.hub import offline
from ..recipes.settings import default_of
from .errors import one_line
from .output import Output

Download = Annotated[
    bool,
    typer.Option(
        "--download", help="Fetch a base that only a file names from the hub.", rich_help_panel="The base model"
    ),
]
OwnCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that comes with the base, if it has any.",
        rich_help_panel="The base model",
    ),
]
Base = Annotated[str | None, typer.Option(help="The base model.", show_default="the one that the adapter names")]
AnAdapter = Annotated[Path, typer.Argument(help="Folder of an adapter, or of a run of `dvora train`.")]
ARun = Annotated[Path, typer.Argument(help="The folder of a finished run.")]
NewFolder = Annotated[Path, typer.Option("--output", "-o", help="A new folder.")]


def _column(meaning: str) -> Any:
    option = typer.Option(
        help=f"Column of the {meaning}.", show_default="as in the training data", rich_help_panel="Columns of the files"
    )
    return Annotated[str | None, option]


AbstainBelow = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Name no class whose probability is below this.", show_default="always name one"),
]
TextColumn, SecondTextColumn = _column("text"), _column("second text of a pair")
LabelColumn = _column("class or number")


def _flag(*names: str, meaning: str) -> Any:
    return Annotated[bool, typer.Option(*names, help=meaning, rich_help_panel="Output")]


_OUTPUT = {
    "as_json": _flag("--json", meaning="One JSON object in place of tables."),
    "quiet": _flag("--quiet", "-q", meaning="No notes, no progress."),
    "debug": _flag("--debug", meaning="Show the traceback of an error."),
}


def command(function: Callable[..., None], as_json: bool = True) -> Callable[..., None]:
    """A function as a command with options for its output, which ends in one line if something is wrong.

    Args:
        function: whose parameter `shown` is where results go; its other ones are what is typed.
        as_json: whether results can be had as JSON.
    """

    @wraps(function)
    def run(quiet: bool, debug: bool, as_json: bool = False, **given: Any) -> None:
        # Packages ask the hub at their import.
        with one_line(debug), offline():
            function(shown=Output(as_json, quiet), **given)

    typed = [parameter for name, parameter in signature(function).parameters.items() if name != "shown"]
    names = [name for name in _OUTPUT if as_json or name != "as_json"]
    return _with_parameters(run, [*typed, *(_parameter(name, _OUTPUT[name], False) for name in names)])


def with_options_of(model: type[BaseModel], short: dict[str, str] | None = None) -> Callable[[Any], Any]:
    """Add the settings of a model to a function's signature, from which Typer makes its options.

    Args:
        model: whose fields are settings; those that the function has parameters for are left to it.
        short: options of one letter, by the names of settings.

    Returns:
        A decorator of a function, which takes what is given as keyword arguments, and None for the rest.
    """

    def decorate(function: Any) -> Any:
        parameters = [*signature(function).parameters.values()]
        parameters = [parameter for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
        names = {parameter.name for parameter in parameters}
        added = [
            _parameter(name, _option(name, field, short or {}), None)
            for name, field in model.model_fields.items()
            if name not in names
        ]
        # Where the help shows them: behind the arguments.
        place = max(1, sum(parameter.default is parameter.empty for parameter in parameters))
        return _with_parameters(function, [*parameters[:place], *added, *parameters[place:]])

    return decorate


def _with_parameters(function: Any, parameters: Sequence[Parameter]) -> Callable[..., None]:
    function.__signature__ = Signature([parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in parameters])
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    typed: Callable[..., None] = function
    return typed


def _parameter(name: str, annotation: Any, default: Any) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _option(name: str, field: FieldInfo, short: dict[str, str]) -> Any:
    extra, meaning = cast(dict[str, Any], field.json_schema_extra), str(field.description)
    flag = f"--{name.replace('_', '-')}"
    option = typer.Option(
        f"{flag}/--no-{flag[2:]}" if field.default is True else flag,
        *filter(None, [short.get(name)]),
        help=f"{meaning[0].upper()}{meaning[1:]}.",
        rich_help_panel=extra["section"],
        show_default=default_of(field) or False,
        hidden=extra["rare"],
    )
    return Annotated[_typed(field.annotation) | None, option]


def _typed(annotation: Any) -> Any:
    """What is typed for a setting: one of several words and a mapping are text, which the model checks."""
    origin = get_origin(annotation)
    if origin is tuple:
        return list[str]
    if origin in (Union, UnionType):
        return _typed(get_args(annotation)[0])
    return str if origin in (Literal, dict) else annotation
