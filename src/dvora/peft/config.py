"""DVoRAConfig: the settings of one adapter, as PEFT stores them."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType

from ..checks import (
    checked_alpha,
    checked_d_initial,
    checked_direction,
    checked_rank,
    checked_strength,
    fits_float32,
)
from ..functional import Vectors
from ..matrices.interface import FORMAT_VERSION, SharedProjections, checked_distribution
from ..matrices.vera import vera_sizes
from .adapter_folder import AdapterFile, Shape, shapes_in
from .config_checks import all_of, check_training, check_types
from .expressions import check_expressions, first_match

_SIZING = (
    *("r", "rank_pattern", "target_modules", "target_parameters", "magnitude_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "base_probes"),
)
BIASES = ("none", "all", "dvora_only")


@dataclass
class DVoRAConfig(PeftConfig):
    """Configuration of a DVoRA adapter.

    Reasons for the defaults: "Choosing" in the documentation, and the rows of `benchmarks/results/quality.json` by
    question. Where those do not decide, the defaults are the papers'.

    Args:
        r: rank of the update; VeRA and DVoRA use far larger ranks than LoRA, since a rank costs one value a layer
            (question 2: rows `dvora_r16` to `dvora_r1024`).
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
        projection_init: their distribution: "structured", or "kaiming_uniform", the papers' independent values, which
            train as well and are slower at high ranks in wide models. Adapters converted from PEFT's VeRA have
            "peft_vera(r=R, in=I, out=O)".
        save_projection: also write the matrices into the adapter's file. Loading never needs them: it makes them from
            the seed, bit for bit, and checks those in the file against them.
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

    r: int = field(default=256, metadata={"help": "rank of the update"})
    alpha: float | None = field(default=None, metadata={"help": "the update is scaled by alpha / r; None means r"})
    target_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "layers to adapt"})
    target_parameters: list[str] | None = field(default=None, metadata={"help": "parameters to adapt"})
    magnitude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "layers that get the magnitude only"}
    )
    exclude_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "layers to leave out"})
    train: list[str] | tuple[str, ...] = field(
        default=Vectors._fields, metadata={"help": "which of the three vectors are trained"}
    )
    strength: float | dict[str, float] = field(default=1.0, metadata={"help": "s of W + s (W' - W)"})
    direction: str = field(default="unit", metadata={"help": "'unit' or 'weight'"})
    d_initial: float = field(default=0.1, metadata={"help": "starting value of lambda_d"})
    detach_norm: bool = field(default=False, metadata={"help": "leave the gradient through the norm out"})
    dvora_dropout: float = field(default=0.0, metadata={"help": "dropout of the inputs of the update"})
    projection_seed: int = field(default=0, metadata={"help": "names the shared random matrices"})
    projection_init: str = field(default="structured", metadata={"help": "their distribution"})
    save_projection: bool = field(default=False, metadata={"help": "also save the shared matrices"})
    bias: str = field(default="none", metadata={"help": "'none', 'all' or 'dvora_only'"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "further modules to train and save"})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "tokens whose embeddings are trained whole"}
    )
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "ranks by layer name"})
    alpha_pattern: dict[str, float] = field(default_factory=dict, metadata={"help": "alphas by layer name"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "layer indices to adapt"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "name of their module list"})
    init_weights: bool = field(default=True, metadata={"help": "start as the identity"})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "follows from the layer's type"})
    projection_format: int = field(default=FORMAT_VERSION, metadata={"help": "version of the projections' format"})
    projection_fingerprint: str | None = field(default=None, metadata={"help": "hash of the projections"})
    base_probes: dict[str, list[float]] | None = field(
        default=None, metadata={"help": "norms and projections of the base"}
    )
    # Taken and dropped: files of older versions hold it, and it changed no output. Removing it in `from_json_file`
    # would not do: `PeftConfig.from_pretrained` reads files itself, and warns of what this constructor does not take.
    norm_cache: InitVar[object] = None

    def __post_init__(self, norm_cache: object) -> None:
        super().__post_init__()
        # A caller may use one configuration for several bases, so the field itself stays unchanged.
        self.fingerprints_to_save: dict[str, list[float]] | None = None
        # The file of values in the same folder, if the configuration was read from one.
        self.file: AdapterFile | None = None
        # Until those values are loaded: the parameters that were trained before the adapter was added.
        self.awaited: set[str] | None = None
        self.peft_type = PeftType["DVORA"]
        check_types(vars(self))
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
        """Read a configuration, of any method, and names and shapes from the header of its file of values.

        They are compared before a model gets an adapter from it.

        Raises:
            TypeError, ValueError: a setting is of the wrong type or out of range, or a file is damaged.
        """
        config: PeftConfig = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        shapes = shapes_in(Path(pretrained_model_name_or_path, subfolder or ""))
        if isinstance(config, DVoRAConfig):
            config.file, config.awaited = AdapterFile(shapes, config.sizing()), set()
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """The settings in a file.

        Raises:
            ValueError: it is damaged, holds something else, or is of no method that PEFT knows.
        """
        try:
            settings = super().from_json_file(path_json_file, **kwargs)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path_json_file} cannot be read as JSON: {error}") from error
        return _checked_method(settings, path_json_file)

    @classmethod
    def from_bytes(cls, settings: bytes, shapes: Mapping[str, Shape]) -> PeftConfig:
        """A configuration, of any method, from the content of its file.

        Args:
            settings: of an adapter_config.json.
            shapes: of the values in the adapter's other file, by name.

        Raises:
            TypeError, ValueError: a setting is of the wrong type or out of range, or the content is damaged.
        """
        try:
            found = json.loads(settings)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"adapter_config.json cannot be read as JSON: {error}") from error
        config: PeftConfig = cls.from_peft_type(**_checked_method(found, "adapter_config.json"))
        if isinstance(config, DVoRAConfig):
            config.file, config.awaited = AdapterFile(shapes, config.sizing()), set()
        return config

    def check(self) -> None:
        """Check every setting; done when the configuration is made, and again before it changes a model.

        Raises:
            TypeError, ValueError: a value is of the wrong type or out of range.
        """
        check_types(vars(self))
        check_expressions(vars(self))
        self._check_numbers()
        self._check_choices()
        if not self.inference_mode and self.file is None:
            check_training(vars(self))
        self._check_projections()

    def to_dict(self) -> dict[str, Any]:
        """The settings as a dictionary; sets become sorted lists, so that equal configs make equal files."""
        settings = super().to_dict()
        settings |= {"train": list(self.train), "base_probes": self.fingerprints_to_save or self.base_probes}
        return {k: sorted(v) if isinstance(v, set) else v for k, v in settings.items()}

    def sizing(self) -> dict[str, Any]:
        """The settings that say which vectors there are, and for which base."""
        return copy.deepcopy({name: getattr(self, name) for name in _SIZING})

    def forget_file(self) -> None:
        """Make the configuration that of a new adapter, no longer tied to the file it was read with."""
        self.file = self.awaited = None

    def rank_of(self, layer_name: str) -> int:
        """The rank of a layer: its entry in `rank_pattern`, else `r`."""
        return self.rank_pattern.get(first_match(self.rank_pattern, layer_name), self.r)

    def alpha_of(self, layer_name: str) -> float | None:
        """The alpha of a layer: its entry in `alpha_pattern`, else `alpha`."""
        return self.alpha_pattern.get(first_match(self.alpha_pattern, layer_name), self.alpha)

    def strength_of(self, layer_name: str) -> float:
        """The strength of a layer: `strength`, or its entry there, else 1."""
        if isinstance(self.strength, dict):
            exact = layer_name in self.strength
            return self.strength.get(layer_name if exact else first_match(self.strength, layer_name), 1.0)
        return self.strength

    def _check_numbers(self) -> None:
        for rank in (self.r, *self.rank_pattern.values()):
            checked_rank(rank)
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            if alpha is not None:
                checked_alpha(alpha)
        checked_d_initial(self.d_initial)
        strengths = self.strength.values() if isinstance(self.strength, dict) else [self.strength]
        for strength in strengths:
            checked_strength(strength)
        dropout = self.dvora_dropout
        if isinstance(dropout, bool) or not isinstance(dropout, int | float):
            raise TypeError(f"dvora_dropout must be a number, got {dropout!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dvora_dropout must lie in 0 <= p < 1, got {dropout}")
        for layer, probes in (self.base_probes or {}).items():
            if not all(map(fits_float32, probes)):
                raise ValueError(f"base_probes of {layer} are not finite: {probes!r}")

    def _check_choices(self) -> None:
        checked_direction(self.direction)
        if self.bias not in BIASES:
            raise ValueError(f"unknown bias {self.bias!r}, expected one of {', '.join(BIASES)}")
        if not (all_of(self.train, str) and self.train and set(self.train) <= set(Vectors._fields)):
            raise ValueError(f"train must name at least one of {', '.join(Vectors._fields)}, got {self.train!r}")
        for name in ("detach_norm", "save_projection", "init_weights", "fan_in_fan_out"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern is set but layers_to_transform is not; set both or neither")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError(
                f"layers_to_transform works with a list of target_modules only, got target_modules="
                f"{self.target_modules!r}; put the indices into the expression instead"
            )

    def _check_projections(self) -> None:
        if self.projection_format != FORMAT_VERSION:
            raise ValueError(
                f"projection_format is {self.projection_format!r}, this version makes format {FORMAT_VERSION}; "
                "load the adapter with the version that saved it"
            )
        checked_distribution(self.projection_init)
        SharedProjections(self.projection_seed, self.projection_init)
        # PEFT's VeRA draws whole matrices, which must wait until a model is known to need such sizes.
        if vera_sizes(self.projection_init) is None:
            self.check_fingerprint()

    def check_fingerprint(self) -> None:
        """Fill in the fingerprint of the projections, or compare it.

        Raises:
            ValueError: it is that of other matrices.
        """
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


def own_config(config: PeftConfig) -> DVoRAConfig:
    """A configuration from PEFT, asserted to be this method's."""
    assert isinstance(config, DVoRAConfig), type(config)
    return config


def _checked_method(settings: Any, file: str) -> dict[str, Any]:
    """The settings that were in a file, if they are of a method that PEFT knows."""
    if not isinstance(settings, dict):
        raise ValueError(f"{file} holds a {type(settings).__name__}, expected settings by name")
    method = settings.get("peft_type", "DVORA")
    if not (isinstance(method, str) and method in PEFT_TYPE_TO_CONFIG_MAPPING):
        raise ValueError(f"{file}: peft_type is {method!r:.100}, which is no method that PEFT knows")
    # PEFT passes them on as keyword arguments, where these two have another meaning.
    if reserved := {"cls", "self"}.intersection(settings):
        raise ValueError(f"{file}: {min(reserved)!r} is not a setting")
    return settings
