"""The settings of a training run: one flat table of keys, each a key of the YAML file and most of them a flag."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args

import yaml  # type: ignore[import-untyped]
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..tools.pages.text import did_you_mean
from .files import read_small

Task = Literal["text-classification", "regression", "sentence-pairs", "image-classification", "causal-lm"]
Method = Literal["dvora", "vera", "lora", "dora", "full", "head"]
Group = Literal["magnitude", "lambda_b", "lambda_d", "head"]
Projections = Literal["kaiming_uniform", "structured"]
TASKS: tuple[Task, ...] = get_args(Task)
METHODS: tuple[Method, ...] = get_args(Method)
PATHS = ("data", "validation_data", "test_data")
"""Keys that take one path or several."""
RANKS: dict[Method, int] = {"dvora": 256, "vera": 256, "lora": 8, "dora": 8}
LEARNING_RATES: dict[Method, float] = {
    "dvora": 1e-2, "vera": 3e-2, "lora": 1e-3, "dora": 1e-3, "full": 5e-5, "head": 1e-3,
}  # fmt: skip
OWN_CODE = "trust_remote_code"
"""Once a setting; now only whoever calls can say it."""
LARGEST_CONFIG, DEEPEST = 2**18, 8
"""Bytes of a configuration, and lists in lists in it."""
HEAD_RATE = 1e-3
"""Of new layers, where neither they nor the method are given another."""


def _key(section: str, comment: str, default: Any = ..., **bounds: Any) -> Any:
    return Field(default, description=comment, json_schema_extra={"section": section}, **bounds)


def _what(comment: str, default: Any = ..., **bounds: Any) -> Any:
    return _key("What to train, and on what", comment, default, **bounds)


def _data(comment: str, default: Any = ..., **bounds: Any) -> Any:
    return _key("The data", comment, default, **bounds)


def _method(comment: str, default: Any = ..., **bounds: Any) -> Any:
    return _key("The method", comment, default, **bounds)


def _training(comment: str, default: Any = ..., **bounds: Any) -> Any:
    return _key("Training", comment, default, **bounds)


def _watching(comment: str, default: Any = ..., **bounds: Any) -> Any:
    return _key("Evaluating, saving, stopping", comment, default, **bounds)


class Settings(BaseModel):
    """Everything that a run depends on; null means "chosen from the model, the data or the method"."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    task: Task = _what(f"one of {', '.join(TASKS)}")
    model: str = _what("the base: a folder, or a name on the hub")
    data: tuple[str, ...] = _what(
        "files (csv, tsv, jsonl, json, parquet, txt), or a folder with one folder of images for each class",
        min_length=1,
    )
    output: str = _what("the folder of the run, which must not hold another", "dvora-run", min_length=1)

    text_column: str | None = _data("column of the text, or of the chat's messages; null: guessed from its name", None)
    second_text_column: str | None = _data("column of a pair's second text; null: guessed", None)
    label_column: str | None = _data("column of the class or the number to tell; null: guessed", None)
    label_kind: Literal["classes", "numbers"] | None = _data(
        "what sentence pairs are judged by: classes or numbers; null: seen from the labels", None
    )
    encoding: str | None = _data("encoding of text files; null: UTF-8, else windows-1252", None)
    validation_data: tuple[str, ...] = _data("files to validate on in place of a share of the data", ())
    test_data: tuple[str, ...] = _data("files to test on in place of a share of the data", ())
    validation_share: float = _data("share of the data that is held out to choose the best step", 0.1, ge=0, lt=1)
    test_share: float = _data("share of the data that is held out to the end", 0.1, ge=0, lt=1)
    split_seed: int = _data("names the split: which rows are held out", 0, ge=0, lt=2**32)
    tokenizer: str | None = _data("the tokenizer or image processor, if it is not beside the model", None)
    max_length: int | None = _data(
        "tokens of a text beyond which it is cut; null: 128, and 256 for causal-lm", None, ge=2
    )

    method: Method = _method(f"one of {', '.join(METHODS)}", "dvora")
    rank: int | None = _method("rank of the update; null: 256 for dvora and vera, 8 for lora and dora", None, ge=1)
    alpha: float | None = _method(
        "the update is scaled by alpha / rank; null: by 1, by 2 for lora and dora", None, gt=0
    )
    targets: str | tuple[str, ...] = _method('layers to adapt: "all-linear", names or an expression', "all-linear")
    projections: Projections = _method("dvora's random matrices: kaiming_uniform or structured", "kaiming_uniform")
    projection_seed: int = _method("names the random matrices of dvora and vera", 0, ge=0, lt=2**32)
    dropout: float = _method("dropout of the inputs of the update", 0.0, ge=0, lt=1)

    learning_rate: float | None = _training(
        f"null: by method ({', '.join(f'{name} {rate:g}' for name, rate in LEARNING_RATES.items())}), "
        f"and {HEAD_RATE:g} for new layers; dvora's magnitude has one in proportion to it and to the base's rows",
        None,
        gt=0,
    )
    learning_rates: dict[Group, float] = _training(
        "by group where they differ: magnitude, lambda_b, lambda_d (dvora), head (new layers)", {}
    )
    weight_decay: float = _training("of everything but dvora's magnitude", 0.0, ge=0)
    epochs: float = _training("times that the training data is read", 3.0, gt=0)
    max_steps: int | None = _training("steps, in place of epochs", None, ge=1)
    batch_size: int = _training("rows of a batch, on each device", 16, ge=1)
    accumulation: int = _training("batches of a step", 1, ge=1)
    schedule: Literal["linear", "cosine", "constant"] = _training("how the learning rate falls", "linear")
    warmup_share: float = _training("share of the steps in which the learning rate rises first", 0.06, ge=0, lt=1)
    max_gradient_norm: float = _training("gradients are scaled down to this norm; 0: they are not", 1.0, ge=0)
    mixed_precision: Literal["no", "bf16", "fp16"] = _training("no, bf16 or fp16", "no")
    gradient_checkpointing: bool = _training("spend time to save memory", False)
    base_dtype: Literal["float32", "bfloat16", "float16"] = _training("of the base's weights", "float32")
    cpu: bool = _training("train on the CPU even where there is a GPU", False)
    seed: int = _training("of new layers, order and dropout", 0, ge=0, lt=2**32)

    evaluate_every: int | None = _watching("steps between evaluations; null: an epoch", None, ge=1)
    save_every: int | None = _watching(
        "steps between checkpoints, a multiple of evaluate_every; null: as evaluate_every", None, ge=1
    )
    keep_best: bool = _watching("end with the best step by validation instead of the last", True)
    early_stopping: int | None = _watching(
        "stop after so many evaluations without a better one; null: never", None, ge=1
    )
    tensorboard: bool = _watching(
        "write logs for TensorBoard into the run's folder (needs the package tensorboard)", False
    )

    @property
    def all_data(self) -> tuple[str, ...]:
        """The files and folders of all parts."""
        return (*self.data, *self.validation_data, *self.test_data)

    @field_validator(*PATHS, mode="before")
    @classmethod
    def _one_is_a_list_of_one(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _no_is_not_false(cls, value: object) -> object:
        # YAML reads a bare `no` as false.
        return "no" if value is False else value

    @model_validator(mode="after")
    def _fit_together(self) -> "Settings":
        if self.validation_share + self.test_share >= 1:
            raise ValueError(
                f"validation_share {self.validation_share} and test_share {self.test_share} leave nothing to train on"
            )
        if self.early_stopping and not self.keep_best:
            raise ValueError("early_stopping is set but keep_best is false; early stopping ends with the best step")
        if self.save_every and not self.evaluate_every and self.keep_best:
            raise ValueError("save_every is set but evaluate_every is not; set both, or keep_best: false")
        if self.save_every and self.evaluate_every and self.save_every % self.evaluate_every and self.keep_best:
            raise ValueError(
                f"save_every {self.save_every} is no multiple of evaluate_every {self.evaluate_every}: the best step "
                "has to be a saved one"
            )
        vectors = {*self.learning_rates} - {"head"}
        if vectors and self.method != "dvora":
            raise ValueError(f"learning_rates has {min(vectors)}, which only the method dvora trains")
        if self.task == "causal-lm" and self.method == "head":
            raise ValueError("causal-lm has no new head to train; use dvora, vera, lora, dora or full")
        return self


def parsed_yaml(text: str) -> Any:
    """What a text of YAML says.

    Raises:
        ValueError: it is not YAML, is nested deeper than any setting, or repeats parts (`*name`): ten lines that repeat
            each other ten times each are ten thousand million.
    """
    try:
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"line {event.start_mark.line + 1} repeats *{event.anchor}; write it out")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise ValueError(f"line {event.start_mark.line + 1} is nested too deeply")
        return yaml.safe_load(text)
    except (yaml.YAMLError, OverflowError) as error:
        raise ValueError(str(error)) from None


def read_settings(file: Path | None, overrides: Mapping[str, Any]) -> Settings:
    """The settings in a YAML file, with some of them replaced.

    Args:
        file: None: all settings are in `overrides`.
        overrides: by key, as from flags; relative paths start at the working directory, as do those in the file.

    Raises:
        ValueError: the file is not YAML, a key is unknown or missing, or a value is not what it may be.
        OSError: the file cannot be read.
    """
    given: Any = {}
    if file is not None:
        text = read_small(file, LARGEST_CONFIG)
        try:
            given = parsed_yaml(text) or {}
        except ValueError as error:
            raise ValueError(f"{file} is not a YAML file of settings: {error}") from None
        if not isinstance(given, dict):
            raise ValueError(
                f"{file} has to hold keys and values, such as `task: regression`; it is a {type(given).__name__}"
            )
    values, source = {**given, **overrides}, str(file) if file else "the settings"
    if values.get(OWN_CODE) not in (None, False):
        raise ValueError(
            f"{source}: {OWN_CODE} is no setting: no file may say that code is run. If you trust the model's author, "
            "give --trust-remote-code"
        )
    return checked_settings(values, source)


def checked_settings(values: Mapping[str, Any], source: str) -> Settings:
    """Settings from keys and values; what earlier versions noted on code of the model's own is passed over.

    Raises:
        ValueError: in one line, what is wrong with which key of `source`.
    """
    try:
        return Settings.model_validate({key: value for key, value in values.items() if key != OWN_CODE})
    except ValidationError as error:
        told = [_told(cast(dict[str, Any], problem)) for problem in error.errors()]
        raise ValueError(f"{source}: {'; '.join(dict.fromkeys(told))}") from None


def _told(problem: dict[str, Any]) -> str:
    key = ".".join(str(part) for part in problem["loc"] if part not in ("str", "tuple[str, ...]", "[key]"))
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key!r}, {did_you_mean(key, Settings.model_fields)}"
    if problem["type"] == "missing":
        return f"{key} is missing: {Settings.model_fields[key].description}"
    if problem["type"] == "value_error":
        return cast(str, problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "literal_error" and isinstance(problem["input"], str):
        expected = [part.strip("' ") for part in problem["ctx"]["expected"].replace(" or ", ", ").split(", ")]
        return f"{key} is {problem['input']!r}, {did_you_mean(problem['input'], expected)}"
    return f"{key} is {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def resolved(settings: Settings) -> Settings:
    """The same run from any working directory, with what was left to the method written out.

    A name that is a file or folder here becomes an absolute path, any other stays the name on the hub that it is.
    """

    def path(name: str) -> str:
        return str(Path(name).resolve()) if Path(name).exists() else name

    by_group = settings.learning_rates
    if settings.learning_rate is None and settings.method != "head" and settings.task != "causal-lm":
        by_group = {"head": HEAD_RATE, **by_group}
    return settings.model_copy(
        update={
            "model": path(settings.model),
            "tokenizer": path(settings.tokenizer) if settings.tokenizer else None,
            "output": str(Path(settings.output).resolve()),
            **{key: tuple(map(path, getattr(settings, key))) for key in PATHS},
            "rank": settings.rank or RANKS.get(settings.method),
            "learning_rate": settings.learning_rate or LEARNING_RATES[settings.method],
            "learning_rates": by_group,
            "max_length": settings.max_length or (256 if settings.task == "causal-lm" else 128),
        }
    )


def commented(settings: Settings | None = None) -> str:
    """A YAML file with every key, each with a comment.

    Args:
        settings: None: the defaults, and an example of what has none.
    """
    shown = settings or Settings(task="text-classification", model="path/to/model", data=("reviews.csv",))
    lines, section = [], ""
    for key, field in Settings.model_fields.items():
        extra = cast(dict[str, str], field.json_schema_extra)
        if extra["section"] != section:
            section = extra["section"]
            lines += ["", f"# {section}"]
        lines += [f"# {field.description}", _entry(key, shown.model_dump(mode="json")[key])]
    return "\n".join(lines[1:]) + "\n"


def _entry(key: str, value: object) -> str:
    if key in PATHS and isinstance(value, list) and len(value) == 1:
        value = value[0]
    # A mapping in flow style, without its braces.
    dumped: str = yaml.safe_dump({key: value}, default_flow_style=True, allow_unicode=True, width=10**9)
    return dumped.strip()[1:-1]
