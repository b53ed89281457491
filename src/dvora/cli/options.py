"""Options of a command from a pydantic model: one for each setting, with its meaning, section and default."""

from collections.abc import Callable
from inspect import Parameter, Signature, signature
from types import UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ..recipes.settings import default_of


def with_options_of(model: type[BaseModel], short: dict[str, str]) -> Callable[[Any], Any]:
    """Add the settings of a model to a command's signature, from which Typer makes its options.

    Args:
        model: whose fields are settings; those that the command has parameters for are left to it.
        short: options of one letter, by the names of settings.

    Returns:
        A decorator of a command, which takes what is given as keyword arguments, and None for the rest.
    """

    def decorate(command: Any) -> Any:
        own = [
            parameter
            for parameter in signature(command).parameters.values()
            if parameter.kind is not parameter.VAR_KEYWORD
        ]
        kind, taken = Parameter.POSITIONAL_OR_KEYWORD, {parameter.name for parameter in own}
        added = [
            Parameter(name, kind, default=None, annotation=_option(name, field, short))
            for name, field in model.model_fields.items()
            if name not in taken
        ]
        # Where the help shows them: behind the arguments.
        place = max(1, sum(parameter.default is parameter.empty for parameter in own))
        command.__signature__ = Signature([*own[:place], *added, *own[place:]])
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *added)}
        return command

    return decorate


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
