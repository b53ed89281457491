"""The settings of a training run, each named once: a key of config.yaml, an option of `dvora train`, and its checks."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import wrap
from typing import Annotated, Any, Literal, cast, get_args

import yaml  # type: ignore[import-untyped]
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic.fields import FieldInfo

from ..text import shown
from .files import checked, parsed_yaml, read_small

Task = Literal[
    "text-classification", "regression", "sentence-pairs", "token-classification", "image-classification", "causal-lm"
]
Method = Literal["dvora", "vera", "lora", "dora", "full", "head"]
Group = Literal["magnitude", "lambda_b", "lambda_d", "head"]
Paths = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]
"""One path, or several."""
TASKS: tuple[Task, ...] = get_args(Task)
METHODS: tuple[Method, ...] = get_args(Method)
PATHS = ("data", "validation_data", "test_data")
RANKS: dict[Method, int] = {"dvora": 64, "vera": 256, "lora": 8, "dora": 8}
LEARNING_RATES: dict[Method, float] = {
    "dvora": 2e-2, "vera": 3e-2, "lora": 2e-3, "dora": 2e-3, "full": 5e-5, "head": 1e-3,
}  # fmt: skip
SMALL_RANK, SMALL_RANK_RATE = 4, 4e-3
"""Up to this rank LoRA and DoRA learn best at a higher rate (`benchmarks/results/equal_bytes.json`)."""
LARGEST_CONFIG = 2**18
"""Bytes of a configuration."""
HEAD_RATE = 1e-3
"""Of new layers, where neither they nor the method are given another."""
EPOCHS, MOST_STEPS = 3.0, 1000
"""The length of a run that sets none: about ten minutes for a small model of short texts on two CPU cores."""
GUESSED = "guessed from its name"
WIDTH = 98
"""Letters of a line of comments in config.yaml."""


def setting(
    section: str, meaning: str, default: Any = ..., *, null: str = "", rare: bool = False, **checks: Any
) -> Any:
    """A setting of a model, which is an option of a command.

    Args:
        section: of the command's help, and of config.yaml.
        meaning: for both.
        default: left out: the setting has to be given.
        null: what None stands for.
        rare: left out of `--help`; the option is there all the same.
        checks: of pydantic: ge, gt, lt, allow_inf_nan, min_length.
    """
    extra: dict[str, Any] = {"section": section, "null": null, "rare": rare}
    return Field(default, description=meaning, json_schema_extra=extra, **checks)


_what = partial(setting, "What to train, and on what")
_data = partial(setting, "The data")
_method = partial(setting, "The method")
_training = partial(setting, "Training")
_evaluating = partial(setting, "Evaluating, saving, stopping")
_sampling = partial(setting, "How tokens are chosen")


class Settings(BaseModel):
    """Everything that a run depends on: each is a key of config.yaml, and an option of `dvora train`."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    task: Task = _what(f"what to train for: {', '.join(TASKS)}")
    model: str = _what("the base model: a folder, or a name on the hub")
    data: Paths = _what(
        "files (csv, tsv, jsonl, json, parquet, txt), or a folder with one folder of images for each class; several "
        "as a list, or with the option given again",
        min_length=1,
    )
    output: str = _what("the folder of the run, which must not hold another", "dvora-run", min_length=1)

    text_column: str | None = _data("column of the text, or of the messages of a chat", None, null=GUESSED)
    second_text_column: str | None = _data("column of the second text of a pair", None, null=GUESSED)
    label_column: str | None = _data("column of the class, the number or the entities to predict", None, null=GUESSED)
    label_kind: Literal["classes", "numbers"] | None = _data(
        "what the labels of sentence pairs are: classes or numbers", None, null="found from the labels", rare=True
    )
    encoding: str | None = _data("encoding of text files", None, null="UTF-8, else windows-1252", rare=True)
    validation_data: Paths = _data("files to validate on in place of a share of the data", (), rare=True)
    test_data: Paths = _data("files to test on in place of a share of the data", (), rare=True)
    validation_share: float = _data("share of the data held out to choose the best step", 0.1, ge=0, lt=1)
    test_share: float = _data("share of the data held out for the final test", 0.1, ge=0, lt=1)
    split_seed: int = _data("seed of the split: which rows are held out", 0, ge=0, lt=2**32, rare=True)
    tokenizer: str | None = _data(
        "folder or name of the tokenizer or image processor", None, null="the model's own", rare=True
    )
    max_length: int | None = _data(
        "tokens to which longer texts are cut", None, null="128, and 256 for causal-lm", ge=2
    )

    method: Method = _method(f"what is trained: {', '.join(METHODS)}", "dvora")
    rank: int | None = _method("rank of the update", None, null="64 for dvora, 256 for vera, 8 for lora and dora", ge=1)
    lambda_d_groups: int = _method("groups of inputs of each layer with a lambda_d of their own (dvora)", 1, ge=1)
    alpha: float | None = _method(
        "the update is scaled by alpha / rank", None, null="a scale of 1, of 2 for lora and dora", gt=0, rare=True
    )
    targets: str | tuple[str, ...] = _method(
        "layers to adapt: all-linear, or a regular expression for their names", "all-linear"
    )
    blocks: str | None = _method(
        "adapt the last blocks only, such as last:2",
        None,
        null="all",
        pattern=r"^last:[1-9]\d*$",
    )
    projection_seed: int = _method("seed of the random matrices of dvora and vera", 0, ge=0, lt=2**32, rare=True)
    dropout: float = _method("dropout of the inputs of the update", 0.0, ge=0, lt=1, rare=True)

    learning_rate: float | None = _training(
        "learning rate",
        None,
        null=f"by method: {', '.join(f'{name} {rate:g}' for name, rate in LEARNING_RATES.items())}; "
        f"{SMALL_RANK_RATE:g} for lora and dora up to rank {SMALL_RANK}",
        gt=0,
        allow_inf_nan=False,
    )
    learning_rates: dict[Group, float] = _training(
        "learning rates of groups that differ: magnitude, lambda_b, lambda_d (dvora), head (new layers). Left out, the "
        "magnitude has one in proportion to learning_rate and to the norms of the base's rows, and new layers have "
        f"{HEAD_RATE:g}",
        {},
        rare=True,
    )
    weight_decay: float = _training("weight decay of everything but dvora's magnitude", 0.0, ge=0, rare=True)
    epochs: float | None = _training(
        "passes over the training data", None, null=f"{EPOCHS:g}, but no more than {MOST_STEPS:,} steps", gt=0
    )
    max_steps: int | None = _training("optimizer steps, in place of epochs", None, null="those of the epochs", ge=1)
    batch_size: int = _training("rows of a batch, on each device", 16, ge=1)
    accumulation: int = _training("batches of an optimizer step", 1, ge=1)
    schedule: Literal["linear", "cosine", "constant"] = _training(
        "how the learning rate falls: linear, cosine or constant", "linear", rare=True
    )
    warmup_share: float = _training(
        "share of the steps in which the learning rate rises first", 0.06, ge=0, lt=1, rare=True
    )
    max_gradient_norm: float = _training("norm to which gradients are clipped; 0: never", 1.0, ge=0, rare=True)
    mixed_precision: Literal["no", "bf16", "fp16"] = _training(
        "precision of the computation: no (full), bf16 or fp16", "no"
    )
    gradient_checkpointing: bool = _training("recompute activations in the backward pass, to save memory", False)
    base_dtype: Literal["float32", "bfloat16", "float16"] = _training(
        "dtype of the base's weights: float32, bfloat16 or float16", "float32", rare=True
    )
    cpu: bool = _training("train on the CPU even where there is a GPU", False, rare=True)
    seed: int = _training("seed of new layers, the order of rows, and dropout", 0, ge=0, lt=2**32)

    evaluate_every: int | None = _evaluating("steps between evaluations", None, null="an epoch", ge=1)
    save_every: int | None = _evaluating(
        "steps between checkpoints, a multiple of evaluate_every", None, null="as evaluate_every", ge=1, rare=True
    )
    if_no_better: Literal["head", "adapter"] = _evaluating(
        "what a run in one process saves if validation rows do not prefer its adapter to the head alone: head (as an "
        "adapter that changes nothing else) or adapter",
        "head",
    )
    refit_head: bool = _evaluating(
        "fit the head again at the end, to what the trained model gives, and keep that if validation rows prefer it "
        "(of runs in one process whose head was fitted at the start)",
        True,
        rare=True,
    )
    keep_best: bool = _evaluating("end with the best step by validation, not the last", True, rare=True)
    calibrate: bool = _evaluating(
        "fit a temperature to the validation rows, if cross-validation lowers their loss, so that probabilities of "
        "classes are as often right as they say",
        False,
    )
    early_stopping: int | None = _evaluating(
        "evaluations without a better one after which training stops", None, null="never", ge=1
    )

    @property
    def all_data(self) -> tuple[str, ...]:
        """The files and folders of all parts."""
        return (*self.data, *self.validation_data, *self.test_data)

    @property
    def rate(self) -> float:
        """The learning rate of resolved settings."""
        assert self.learning_rate is not None, "resolve the settings first"
        return self.learning_rate

    @field_validator("learning_rates", mode="before")
    @classmethod
    def _typed_rates_are_yaml(cls, value: object) -> object:
        """Of an option: `head: 0.001, magnitude: 0.01`, in braces or without them."""
        if not isinstance(value, str):
            return value
        return parsed_yaml(value if value.lstrip().startswith("{") else f"{{{value}}}")

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
        if self.lambda_d_groups > 1 and self.method != "dvora":
            raise ValueError(f"lambda_d_groups is {self.lambda_d_groups}, which only the method dvora has")
        if self.blocks and self.method in ("full", "head"):
            raise ValueError(f"blocks is {self.blocks}, but the method {self.method} adapts no layers; leave it out")
        if self.task == "causal-lm" and self.method == "head":
            raise ValueError("causal-lm has no new head to train; use dvora, vera, lora, dora or full")
        return self


class Sampling(BaseModel):
    """How the tokens of a text are chosen: each is an option of `dvora generate`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_new_tokens: int = _sampling("tokens of a continuation at most", 64, ge=1)
    temperature: float = _sampling("0: always the likeliest; else sampled, such as 0.8", 0.0, ge=0, allow_inf_nan=False)
    top_k: int | None = _sampling("sample from so many of the likeliest", None, null="all", ge=1)
    top_p: float | None = _sampling(
        "sample from the likeliest with this probability together", None, null="all", gt=0, le=1
    )
    repetition_penalty: float = _sampling("above 1: what occurred becomes less likely", 1.0, gt=0, allow_inf_nan=False)
    seed: int = _sampling("seed of the sampling, for each prompt", 0, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _is_sampled(self) -> "Sampling":
        if self.temperature == 0 and (drawn := self.model_fields_set & {"top_k", "top_p"}):
            raise ValueError(
                f"{min(drawn)} is set but temperature is 0, so nothing is sampled; set a temperature, such as 0.8"
            )
        return self


@dataclass(frozen=True)
class Trust:
    """What the caller allows beyond reading files. No file that is read can allow it.

    Args:
        code: run Python code that comes with a model.
        download: ask the hub for a model or a tokenizer; else its cache has to hold what is no folder here.
    """

    code: bool = False
    download: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of transformers' `from_pretrained`."""
        return {"trust_remote_code": self.code, "local_files_only": not self.download}


NOTHING, NAMED = Trust(), Trust(download=True)
"""What is allowed for a model that only a file names, and for one that the caller names."""


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
            raise ValueError(f"{file} is not a YAML file of settings (rows are given by --data): {error}") from None
        if not isinstance(given, dict):
            found = f"it is a {type(given).__name__} (rows are given by --data)"
            raise ValueError(f"{file} has to hold keys and values, such as `task: regression`; {found}")
    return checked_settings({**given, **overrides}, str(file or "the settings"))


def checked_settings(values: Mapping[str, Any], source: str) -> Settings:
    """Settings from keys and values.

    Raises:
        ValueError: see `checked`.
    """
    return checked(Settings, values, f"{source}: ")


def resolved(settings: Settings) -> Settings:
    """The same run from any working directory, with what was left to the method written out.

    A name that is a file or folder here becomes an absolute path, any other stays the name on the hub that it is.
    """

    def path(name: str) -> str:
        # A link stays one: its name may say more than where it leads to.
        return str(Path(name).absolute()) if Path(name).exists() else name

    by_group, rank = settings.learning_rates, settings.rank or RANKS.get(settings.method)
    is_small = settings.method in ("lora", "dora") and rank is not None and rank <= SMALL_RANK
    # Whatever the adapter's rate: the head starts fitted, and a rate of 0.01 undoes some of that.
    if settings.method != "head" and settings.task != "causal-lm":
        by_group = {"head": HEAD_RATE, **by_group}
    return settings.model_copy(
        update={
            "model": path(settings.model),
            "tokenizer": path(settings.tokenizer) if settings.tokenizer else None,
            "output": str(Path(settings.output).resolve()),
            **{key: tuple(map(path, getattr(settings, key))) for key in PATHS},
            "rank": rank,
            "learning_rate": settings.learning_rate
            or (SMALL_RANK_RATE if is_small else LEARNING_RATES[settings.method]),
            "learning_rates": by_group,
            "max_length": settings.max_length or (256 if settings.task == "causal-lm" else 128),
        }
    )


def commented(settings: Settings) -> str:
    """A YAML file with every setting, each with a comment."""
    lines, section = list[str](), ""
    for key, value in settings.model_dump(mode="json").items():
        field = Settings.model_fields[key]
        extra = cast(dict[str, Any], field.json_schema_extra)
        if extra["section"] != section:
            section = extra["section"]
            lines += ["", f"# {section}"]
        null = f"; null: {extra['null']}" if extra["null"] else ""
        lines += [f"# {line}" for line in wrap(f"{field.description}{null}", WIDTH)]
        if key in PATHS and len(value) == 1:
            value = value[0]
        # A mapping in flow style, without its braces.
        entry: str = yaml.safe_dump({key: value}, default_flow_style=True, allow_unicode=True, width=10**9)
        lines.append(entry.strip()[1:-1])
    return "\n".join(lines[1:]) + "\n"


def default_of(field: FieldInfo) -> str:
    """The default of a setting in words; empty where there is none."""
    null: str = cast(dict[str, Any], field.json_schema_extra)["null"]
    return null or ("" if field.is_required() or field.default in (None, (), {}) else shown(field.default))
