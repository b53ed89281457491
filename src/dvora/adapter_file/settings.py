"""DVoRAConfig: the settings of one adapter, as PEFT stores them, and the checks of settings by themselves."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, PeftType
from torch import nn

from ..checks import (
    LARGEST,
    checked_alpha,
    checked_d_initial,
    checked_direction,
    checked_groups,
    checked_rank,
    checked_strength,
    rounds_to_zero,
)
from ..functional import Vectors
from ..matrices.interface import DISTRIBUTION, FORMAT_VERSION, SharedProjections, checked_distribution
from ..whole_files import make_readable
from .card import write_card
from .patterns import check_expressions, value_of
from .values_file import Shape, shapes_in

BIASES = ("none", "all", "dvora_only")
MAX_NAMES = 2**12
"""Entries of a list: PEFT compares each with every module of a model, and with every other."""
MAX_PROBES = 64
"""Numbers in the fingerprint of a layer; far more than this version writes."""
MAX_NAME = 200
"""Characters of an adapter's name, which is a folder's name where several adapters are saved."""
_SIZING = (
    *("r", "rank_pattern", "target_modules", "target_parameters", "magnitude_modules", "exclude_modules"),
    *("lambda_d_groups", "layers_to_transform", "layers_pattern", "base_probes"),
)
_HOLDERS = nn.ModuleDict(), nn.ParameterDict()
_OWN_NAMES = {"weight", "bias", "base_layer"}


@dataclass
class AdapterFile:
    """The file of values that belongs to a configuration which was read, not made.

    Args:
        sizing: the settings on which names and shapes depend, as they were read.
        folder: where the file is, if it is on this machine.
        known_shapes: of the values by name, where they were handed over with the settings, or were read before.
    """

    sizing: dict[str, Any]
    folder: Path | None = None
    known_shapes: Mapping[str, Shape] | None = None
    checked: tuple[str, Mapping[str, str]] | None = None
    """A digest of the values that were checked before PEFT reads them, and the keys in the model by those here."""

    def shapes(self) -> Mapping[str, Shape] | None:
        """Shapes of the values by name; None if there is no such file on this machine.

        Raises:
            ValueError: the file is damaged.
        """
        if self.known_shapes is None and self.folder is not None:
            self.known_shapes = shapes_in(self.folder)
        return self.known_shapes


@dataclass
class DVoRAConfig(PeftConfig):
    """Configuration of a DVoRA adapter.

    Reasons for the defaults: "Choosing" in the documentation, and the rows of `benchmarks/results/quality.json` by
    question. Where those do not decide, the defaults are the papers'.

    Args:
        r: rank of the update; VeRA and DVoRA use far larger ranks than LoRA, since a rank costs one value a layer
            (question 2: rows `dvora_r16` to `dvora_r1024`).
        lambda_d_groups: groups of consecutive inputs of each layer with a lambda_d of their own, at most as many as a
            layer has inputs; a file has lambda_d of (groups, r) then.
        alpha: the update is scaled by `alpha / r`; None means `r`, a scale of one.
        target_modules: names (or a regular expression) of the layers to adapt, or "all-linear"; None takes PEFT's
            default for the architecture. Names that match nothing are warned of, and an error if none matches.
            "all-linear" is what did best (question 3: `feed_forward`, `dvora_attention`, `query_value`).
        target_parameters: names of parameters to adapt that their modules read themselves: matrices, and the stacks of
            mixture-of-experts blocks. Every pass forms the adapted weight, in the parameter's dtype.
        magnitude_modules: names (or a regular expression) of layers that get the magnitude only, one vector a layer,
            whether `target_modules` names them too or not.
        exclude_modules: names (or a regular expression) of layers to leave out.
        train: which of "magnitude", "lambda_b" and "lambda_d" are trained; the others keep their starting values
            (question 3: `lambda_d_frozen`).
        strength: s of `W + s (W' - W)`, where 0 is the base and 1 the adapter itself; a number, or numbers by layer
            name or regular expression, with 1 for the layers that it does not name.
        direction: the update is added to the "unit" rows of the weight or to the "weight" itself (DoRA); question 3:
            `direction_weight`.
        d_initial: starting value of lambda_d (VeRA paper, table 6: 0.1; question 3: `d_initial_0.01`, `d_initial_1`).
        detach_norm: leave the gradient through the norm out (DoRA, section 4.3; question 3: `detached_norm`).
        dvora_dropout: dropout probability of the inputs of the update.
        projection_seed: names the shared random matrices.
        projection_init: their distribution: "kaiming_uniform". Adapters converted from PEFT's VeRA have
            "peft_vera(r=R, in=I, out=O)".
        bias: which biases to train: "none", "all" or "dvora_only" (those of adapted layers).
        modules_to_save: further modules to train and save whole, such as a new head.
        trainable_token_indices: tokens whose embeddings are trained and saved whole, a list of indices for the input
            embeddings or lists by layer name.
        rank_pattern: ranks by layer name or regular expression, where they differ from `r`.
        alpha_pattern: alphas by layer name or regular expression, where they differ from `alpha`.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: name of the module list those indices refer to.
        init_weights: start as the identity. False starts from random vectors, for tests.
        fan_in_fan_out: accepted as by PEFT's other methods; the layout of a weight follows from its layer's type.
        projection_format: version of the projections' format; filled in, and checked on loading.
        projection_fingerprint: hash of the projections; filled in, and checked on loading.
        base_probes: norm and eight random projections of each adapted base weight; written into files, and checked on
            loading, where another base model is refused. Set it to None to load onto another base on purpose.

    Raises:
        TypeError, ValueError: a value is of the wrong type or out of range.
    """

    r: int = 64
    alpha: float | None = None
    target_modules: list[str] | set[str] | str | None = None
    target_parameters: list[str] | None = None
    magnitude_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    train: list[str] | tuple[str, ...] = Vectors._fields
    strength: float | dict[str, float] = 1.0
    direction: str = "unit"
    d_initial: float = 0.1
    detach_norm: bool = False
    dvora_dropout: float = 0.0
    projection_seed: int = 0
    projection_init: str = DISTRIBUTION
    bias: str = "none"
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    init_weights: bool = True
    fan_in_fan_out: bool = False
    projection_format: int = FORMAT_VERSION
    projection_fingerprint: str | None = None
    base_probes: dict[str, list[float]] | None = None
    lambda_d_groups: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        # A caller may use one configuration for several bases, so the field itself stays unchanged.
        self.fingerprints_to_save: dict[str, list[float]] | None = None
        self.file: AdapterFile | None = None
        self.lora: PeftConfig | None = None
        """That of an adapter of LoRA, for which this one stands."""
        self.peft_type = PeftType["DVORA"]
        _check_types(vars(self))
        for name in ("target_modules", "magnitude_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if isinstance(self.train, list):
            self.train = tuple(self.train)
        self.check()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """Read a configuration, of any method; the file of values beside it is compared when a model gets the adapter.

        Raises:
            TypeError, ValueError: a setting is of the wrong type or out of range, or the file is damaged.
        """
        config: PeftConfig = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        if isinstance(config, DVoRAConfig):
            config.file = AdapterFile(config.sizing(), folder if folder.is_dir() else None)
            # At once, since PEFT may match them before it asks for the method.
            check_expressions(vars(config))
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the settings, and into the README.md beside an adapter's values how to load it."""
        super().save_pretrained(save_directory, **kwargs)
        folder = Path(save_directory)
        # PEFT writes its README.md and the values before.
        if values := [folder / name for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME) if (folder / name).exists()]:
            write_card(folder)
            make_readable(values)

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """The settings in a file."""
        read = super().from_json_file
        return _checked_method(lambda: read(path_json_file, **kwargs), path_json_file)

    @classmethod
    def from_bytes(cls, settings: bytes, shapes: Mapping[str, Shape]) -> PeftConfig:
        """A configuration, of any method, from the content of its file.

        Args:
            settings: of an adapter_config.json.
            shapes: of the values in the adapter's other file, by name.

        Raises:
            TypeError, ValueError: a setting is of the wrong type or out of range, or the content is damaged.
        """
        read = _checked_method(lambda: json.loads(settings), "adapter_config.json")
        config: PeftConfig = cls.from_peft_type(**read)
        if isinstance(config, DVoRAConfig):
            config.file = AdapterFile(config.sizing(), known_shapes=shapes)
            check_expressions(vars(config))
        return config

    def check(self, names: Collection[str] = (), *, bounded: bool = False) -> None:
        """Check every setting; done when the configuration is made, and again before it changes a model.

        Args:
            names, bounded: of expressions; those of files are bounded before they are matched.
        """
        _check_types(vars(self))
        check_expressions(vars(self), names, bounded=bounded)
        _check_values(self)
        if not self.inference_mode and self.file is None:
            _check_training(self)
        if self.projection_format != FORMAT_VERSION:
            raise ValueError(
                f"projection_format is {self.projection_format!r}, this version makes format {FORMAT_VERSION}; "
                "load the adapter with the version that saved it"
            )
        checked_distribution(self.projection_init)
        SharedProjections(self.projection_seed, self.projection_init)
        # PEFT's VeRA draws whole matrices, which must wait until a model is known to need such sizes.
        if self.projection_init == DISTRIBUTION:
            self.check_fingerprint()

    def check_fingerprint(self) -> None:
        """Fill in the fingerprint of the projections, or compare it."""
        fingerprint = SharedProjections(self.projection_seed, self.projection_init).fingerprint()
        if self.projection_fingerprint not in (None, fingerprint):
            raise ValueError(
                f"projection_fingerprint is {self.projection_fingerprint!r}, but projection_seed="
                f"{self.projection_seed} and projection_init={self.projection_init!r} give {fingerprint!r}: the "
                "adapter was trained with other shared matrices, or its configuration was edited (or, for peft_vera, "
                "this machine's torch draws other values). To make a new adapter from this configuration, set "
                "projection_fingerprint=None"
            )
        self.projection_fingerprint = fingerprint

    def to_dict(self) -> dict[str, Any]:
        """The settings as a dictionary; sets become sorted lists, so that equal configs make equal files."""
        settings = super().to_dict()
        settings |= {"train": list(self.train), "base_probes": self.fingerprints_to_save or self.base_probes}
        if self.lambda_d_groups == 1:
            # Files of one group are as they were before there were groups.
            del settings["lambda_d_groups"]
        return {k: sorted(v) if isinstance(v, set) else v for k, v in settings.items()}

    def sizing(self) -> dict[str, Any]:
        """The settings that say which vectors there are, and for which base."""
        return copy.deepcopy({name: getattr(self, name) for name in _SIZING})

    def forget_file(self) -> None:
        """Make the configuration that of a new adapter, no longer tied to the file it was read with."""
        self.file = None

    def rank_of(self, layer_name: str) -> int:
        """The rank of a layer: its entry in `rank_pattern`, else `r`."""
        return value_of(self.rank_pattern, layer_name, self.r)

    def alpha_of(self, layer_name: str) -> float | None:
        """The alpha of a layer: its entry in `alpha_pattern`, else `alpha`."""
        return value_of(self.alpha_pattern, layer_name, self.alpha)

    def strength_of(self, layer_name: str) -> float:
        """The strength of a layer: `strength`, or its entry there, else 1."""
        if isinstance(self.strength, dict):
            return self.strength.get(layer_name, value_of(self.strength, layer_name, 1.0))
        return self.strength


def own_config(config: PeftConfig) -> DVoRAConfig:
    """A configuration from PEFT, asserted to be this method's."""
    assert isinstance(config, DVoRAConfig), type(config)
    return config


def check_adapter_name(name: object, taken: Collection[str] = ()) -> None:
    """Refuse a name under which torch or PEFT could not store an adapter, or not find its values again."""
    if not isinstance(name, str):
        raise TypeError(f"adapter_name must be a string, got {name!r:.100} of type {type(name).__name__}")
    if not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise ValueError(f"adapter_name must have 1 to {MAX_NAME} characters, all printable, got {name!r:.300}")
    if "." in name or "\\" in name or name.startswith("/"):
        raise ValueError(
            f"adapter_name {name!r} has a dot or is a path; parameters and folders are named by it, so use another"
        )
    if name in _OWN_NAMES or name in taken or any(hasattr(holder, name) for holder in _HOLDERS):
        raise ValueError(f"adapter_name {name!r} has a meaning of its own in a torch or PEFT model; use another")


def _all(values: object, *types: type) -> bool:
    """Whether it is a collection of values of these very types."""
    return isinstance(values, list | tuple | set) and set(map(type, values)) <= set(types)


def _named(value: dict[Any, Any]) -> bool:
    """Whether all keys are names."""
    return _all(list(value), str)


def _by_layer(value: Any, *types: type) -> bool:
    """Whether it is a dictionary from names to lists of values of these very types."""
    if not (isinstance(value, dict) and _all(list(value.values()), list, tuple, set)):
        return False
    return _all([*chain.from_iterable(value.values())], *types)


_TYPES: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("base_model_name_or_path revision", "a string or None", lambda v: isinstance(v, str | os.PathLike | None)),
    ("modules_to_save target_parameters", "a list of names", lambda v: v is None or _all(v, str)),
    ("rank_pattern alpha_pattern", "a dictionary from names to numbers", lambda v: isinstance(v, dict) and _named(v)),
    ("strength", "a number, or a dictionary from names to numbers", lambda v: not isinstance(v, dict) or _named(v)),
    ("trainable_token_indices", "lists of indices", lambda v: v is None or _all(v, int) or _by_layer(v, int)),
    ("base_probes", "a dictionary from names to lists of numbers", lambda v: v is None or _by_layer(v, float, int)),
    ("detach_norm init_weights fan_in_fan_out", "True or False", lambda v: isinstance(v, bool)),
    ("dvora_dropout", "a number", lambda v: isinstance(v, int | float) and not isinstance(v, bool)),
    (
        "target_modules magnitude_modules exclude_modules layers_pattern",
        "a string or a list of strings",
        lambda v: v is None or isinstance(v, str) or _all(v, str),
    ),
    (
        "layers_to_transform",
        "an index or a list of indices",
        lambda v: v is None or _all(v if isinstance(v, list) else [v], int),
    ),
)
"""Settings, what they must be, and whether a value is; ranks, alphas and choices are checked by their values."""


def _check_types(settings: Mapping[str, Any]) -> None:
    """Refuse settings of the wrong type, and lists that are too long."""
    for names, words, is_valid in _TYPES:
        for name in names.split():
            if not is_valid(settings[name]):
                raise TypeError(f"{name} must be {words}, got {settings[name]!r:.500}")
    for name in ("target_modules", "magnitude_modules", "exclude_modules", "target_parameters", "layers_to_transform"):
        if isinstance(settings[name], list | tuple | set) and len(settings[name]) > MAX_NAMES:
            raise ValueError(f"{name} has {len(settings[name])} entries, expected at most {MAX_NAMES}")
    if "" in (settings["modules_to_save"] or ()):
        # PEFT compares ends of names, so this one is every module's, the model's own included.
        raise ValueError(f"modules_to_save must not hold an empty name, got {settings['modules_to_save']!r}")
    probes = settings["base_probes"] or {}
    if layers := [layer for layer in probes if len(probes[layer]) > MAX_PROBES]:
        name, size = layers[0], len(probes[layers[0]])
        raise ValueError(f"base_probes of {name!r:.100} has {size} numbers, expected {MAX_PROBES} at most")
    if layers := [layer for layer in probes for probe in probes[layer] if not -LARGEST <= probe <= LARGEST]:
        raise ValueError(f"base_probes of {layers[0]} are not finite: {probes[layers[0]]!r}")


def _strengths(config: DVoRAConfig) -> list[float]:
    return list(config.strength.values()) if isinstance(config.strength, dict) else [config.strength]


def _check_values(config: DVoRAConfig) -> None:
    """Refuse numbers out of range, unknown choices, and settings that exclude each other."""
    for rank in (config.r, *config.rank_pattern.values()):
        checked_rank(rank)
    if config.lambda_d_groups != 1 or type(config.lambda_d_groups) is not int:
        checked_groups(config.lambda_d_groups)
    for alpha in (config.alpha, *config.alpha_pattern.values()):
        if alpha is not None:
            checked_alpha(alpha)
    checked_d_initial(config.d_initial)
    for strength in _strengths(config):
        checked_strength(strength)
    if not 0 <= config.dvora_dropout < 1:
        raise ValueError(f"dvora_dropout must lie in 0 <= p < 1, got {config.dvora_dropout}")
    checked_direction(config.direction)
    if config.bias not in BIASES:
        raise ValueError(f"unknown bias {config.bias!r}, expected one of {', '.join(BIASES)}")
    if not (_all(config.train, str) and config.train and set(config.train) <= set(Vectors._fields)):
        raise ValueError(f"train must name at least one of {', '.join(Vectors._fields)}, got {config.train!r}")
    if config.layers_pattern and config.layers_to_transform is None:
        raise ValueError("layers_pattern is set but layers_to_transform is not; set both or neither")
    if config.layers_to_transform is not None and isinstance(config.target_modules, str):
        raise ValueError(
            f"layers_to_transform works with a list of target_modules only, got target_modules="
            f"{config.target_modules!r}; put the indices into the expression instead"
        )


def _check_training(config: DVoRAConfig) -> None:
    """Refuse settings with which a vector that is to be trained would never change."""
    rows = {"lambda_b", "lambda_d"}.intersection(config.train)
    if config.init_weights and rows == {"lambda_d"}:
        raise ValueError(
            f"train={config.train!r} would never move lambda_d: its gradient is zero while lambda_b is, which starts "
            "there and would stay; train lambda_b too, or leave lambda_d out"
        )
    if config.init_weights and rows and rounds_to_zero(config.d_initial):
        raise ValueError(
            f"d_initial={config.d_initial} would never move lambda_b and lambda_d, which are both zero then: "
            "start with another value, or train the magnitude only"
        )
    largest = max((config.r, *config.rank_pattern.values()))
    for name, alphas in (("alpha", [config.alpha]), ("alpha_pattern", config.alpha_pattern.values())):
        if rows and any(alpha is not None and rounds_to_zero(alpha / largest) for alpha in alphas):
            raise ValueError(
                f"{name}={vars(config)[name]!r} gives a scale alpha / r of zero in float32: trains nothing"
            )
    if any(map(rounds_to_zero, _strengths(config))):
        raise ValueError(
            f"strength={config.strength!r} trains nothing where it is zero; leave such layers out with "
            "exclude_modules, or call set_strength once the adapter is trained"
        )


def _checked_method(read: Callable[[], Any], file: str) -> dict[str, Any]:
    """The settings that are in a file, if they are of a method that PEFT knows."""
    try:
        settings = read()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file} holds a {type(settings).__name__}, expected settings by name")
    method = settings.get("peft_type", "DVORA")
    if not (isinstance(method, str) and method in PEFT_TYPE_TO_CONFIG_MAPPING):
        raise ValueError(f"{file}: peft_type is {method!r:.100}, which is no method that PEFT knows")
    # PEFT passes them on as keyword arguments, where these two have another meaning.
    if reserved := {"cls", "self"}.intersection(settings):
        raise ValueError(f"{file}: {min(reserved)!r} is not a setting")
    return settings
