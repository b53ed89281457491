"""Bodies of requests as pydantic models, read within bounds, and what is wrong with one in a few words."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .requests import RefusedError
from .texts import Input

MOST_PARTS, MOST_VALUES = 2**15, 2**20
"""Lists, objects and names of a body, and values: what takes a tenth of a second to read, in which nobody is served."""
MOST_PROBLEMS = 3
"""In an answer."""
B = TypeVar("B", bound="Body")
# Of a list that is wrong the first problem is enough.
Texts = Annotated[list[str], Field(fail_fast=True)]
Ids = Annotated[list[int], Field(fail_fast=True)]
Inputs = Annotated[
    str | Texts | Ids | Annotated[list[Ids], Field(fail_fast=True)],
    Field(description="a text, a list of texts, a list of tokens, or a list of such lists"),
]
Switch = Annotated[bool, Field(description="true or false")]


class Body(BaseModel):
    """Of a request. A null is as if the field was left out; a field that is not named here is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        return {name: v for name, v in values.items() if v is not None} if isinstance(values, dict) else values


def parsed(body: bytes, kind: type[B]) -> B:
    """A body; 400, if it is no JSON, not of this kind, or has too many parts."""
    # Of texts nothing counts: without escaped quotes every second part is one.
    unescaped = body.replace(b"\\\\", b"").replace(b'\\"', b"") if _has_too_much(body) else b""
    if _has_too_much(b"".join(unescaped.split(b'"')[::2])):
        raise RefusedError(
            400,
            f"the body has too many parts; at most {MOST_PARTS:,} lists, objects and names and {MOST_VALUES:,} values "
            "are read, so send less at a time",
        )
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise RefusedError(400, _problems(error, kind)) from None


def _has_too_much(body: bytes) -> bool:
    return sum(map(body.count, (b"[", b"{", b":"))) > MOST_PARTS or body.count(b",") > MOST_VALUES


def _problems(error: ValidationError, kind: type[Body]) -> str:
    """What is wrong with a body, by the descriptions of its fields; nothing of the body is repeated but names."""
    problems: dict[str, str] = {}
    for problem in error.errors(include_url=False, include_context=False, include_input=False):
        # After a field and the place in its list come names of Python's types.
        path = [*problem["loc"][:1], *(part for part in problem["loc"][1:2] if isinstance(part, int))]
        said = problem["msg"].replace("Input should be", "expected")
        if problem["type"] == "json_invalid":
            said = f"the body is no JSON: {said}"
        elif problem["type"] == "extra_forbidden":
            *path, name = path if len(problem["loc"]) == 1 else [*path, problem["loc"][-1]]
            fields = f"; expected {', '.join(kind.model_fields)}" if not path else ""
            said = f"{str(name)[:40]} is not kept here, leave it out{fields}"
        elif not path or kind.model_fields[str(path[0])].description:
            said = f"expected {kind.model_fields[str(path[0])].description if path else 'a JSON object'}"
        place = ".".join(map(str, path))
        problems.setdefault(place, f"{place}: {said}" if place else said)
    return "; ".join([*problems.values()][:MOST_PROBLEMS])


def takes(kind: type[Body]) -> dict[str, Any]:
    """What the documentation of a route says of its body."""
    schema = {**kind.model_json_schema(), "$id": f"/{kind.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def inputs_of(inputs: Any) -> list[Input]:
    """The rows of `Inputs`."""
    return [inputs] if isinstance(inputs, str) or (inputs and isinstance(inputs[0], int)) else inputs
