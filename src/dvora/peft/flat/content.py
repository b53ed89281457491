"""What an adapter consists of, beside its values: read from a model, or from the headers of a folder.

Vectors of two adapters are interchangeable, entry by entry, if these agree:

| what | because |
|---|---|
| names and sizes of layers, and of what is saved whole | they say which entry is which |
| seed, distribution and fingerprint of the projections | entries of lambda scale rows of these matrices |
| direction, and alpha / rank of every layer | they scale lambda_b |
| the tokens that are trained | rows of their table stand in this order |
| the base, by its fingerprints | a magnitude is the norm of one row of one weight |

All but the last are exact, and hashed. Fingerprints of one base differ in the last digit between dtypes, quantisations
and numbers of threads, so they are compared as loading compares them, within a tolerance. Left out is what changes how
an adapter is trained or used, not what its values mean: detach_norm, dropout, `train`, starting values, strength.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import load_peft_weights
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ...functional import Vectors
from ..adapter_folder import MATRIX_PREFIX, PEFT_PREFIX, VECTOR_PREFIX, Shape, layer_and_vector, plain_name
from ..base_weight import alike
from ..config import DVoRAConfig
from ..layer import DVoRALayer, layers_of
from ..state.checked_values import OF_SAVED_MODULES, check_file, outside_saved_modules

FORMAT_VERSION = 1
"""Of the order of a vector's entries and of what the digest covers."""
_Named = TypeVar("_Named")


class LayerSizes(NamedTuple):
    """The vectors of one layer: how many entries, and on what scale."""

    name: str
    out_features: int
    rank: int
    """0 for a layer that has the magnitude only."""
    scaling: float
    """alpha / rank."""

    @property
    def lengths(self) -> tuple[int, int, int]:
        """Of magnitude, lambda_b and lambda_d."""
        return self.out_features, self.out_features if self.rank else 0, self.rank


class SavedWhole(NamedTuple):
    """A tensor that is trained and saved whole: of a head, a bias, a table of tokens."""

    name: str
    shape: Shape


class Settings(NamedTuple):
    """What all layers of an adapter have in common."""

    direction: str
    projection_seed: int
    projection_init: str
    projection_fingerprint: str | None
    tokens: tuple[tuple[str, tuple[int, ...]], ...]
    """Indices by the layer's name; "" is the input embeddings."""

    @classmethod
    def of(cls, config: DVoRAConfig) -> Settings:
        """Those of a configuration."""
        tokens = config.trainable_token_indices or {}
        by_layer = tokens if isinstance(tokens, dict) else {"": tokens}
        return cls(
            config.direction,
            config.projection_seed,
            config.projection_init,
            config.projection_fingerprint,
            tuple((name, tuple(by_layer[name])) for name in sorted(by_layer)),
        )


class Content(NamedTuple):
    """What an adapter consists of, in the order of a vector: layers by name, then what is saved whole by name."""

    settings: Settings
    layers: tuple[LayerSizes, ...]
    whole: tuple[SavedWhole, ...]
    base: tuple[tuple[str, tuple[float, ...]], ...]
    """Fingerprints of the base weights by layer, where they are known."""

    @classmethod
    def of_folder(cls, folder: Path) -> Content:
        """That of a saved adapter: its configuration, and names and shapes of its values; no value is read.

        Raises:
            TypeError, ValueError: there is no DVoRA adapter, or it is damaged or of another format.
        """
        config = _config_of(folder)
        return cls.of_saved(config, _shapes_of(config, folder))

    @classmethod
    def of_saved(cls, config: DVoRAConfig, shapes: Mapping[str, Shape]) -> Content:
        """That of a saved adapter with this configuration and values of these shapes.

        Raises:
            ValueError: the values are not those of a DVoRA adapter.
        """
        vectors: dict[str, dict[str, Shape]] = {}
        for key, shape in shapes.items():
            if _is_vector(key):
                layer, vector = layer_and_vector(key)
                vectors.setdefault(plain_name(layer), {})[vector] = shape
        whole = {_plain(key): shape for key, shape in shapes.items() if _is_trained_whole(key, config)}
        return cls(
            Settings.of(config),
            tuple(_sizes(name, vectors[name], config) for name in sorted(vectors)),
            tuple(SavedWhole(name, whole[name]) for name in sorted(whole)),
            tuple(sorted((plain_name(name), tuple(probes)) for name, probes in (config.base_probes or {}).items())),
        )

    @property
    def digest(self) -> str:
        """A hash of all that must be equal to the last bit; the base is compared by `difference`."""
        exact = [FORMAT_VERSION, self.settings, self.layers, self.whole]
        return hashlib.sha256(json.dumps(exact).encode()).hexdigest()[:16]

    def difference(self, other: Content) -> str | None:
        """Why a vector of one is none of the other, in words; None if it is one."""
        ours, theirs = self.settings._asdict(), other.settings._asdict()
        for setting in ours:
            if ours[setting] != theirs[setting]:
                return f"{setting} is {ours[setting]!r:.200} here and {theirs[setting]!r:.200} there"
        own, others = self._by_name(), other._by_name()
        for name in sorted(own.keys() | others.keys()):
            if own.get(name) != others.get(name):
                return f"{name} is {_in_words(own.get(name))} here and {_in_words(others.get(name))} there"
        base = dict(other.base)
        for name, fingerprint in self.base:
            if name in base and not alike(list(base[name]), list(fingerprint)):
                return (
                    f"the base models differ: norm and random projections of the weight of {name} are "
                    f"{list(fingerprint)} here and {list(base[name])} there"
                )
        return None

    def _by_name(self) -> dict[str, LayerSizes | SavedWhole]:
        return {**{layer.name: layer for layer in self.layers}, **{each.name: each for each in self.whole}}


class ModelAdapter(NamedTuple):
    """An adapter in a model, looked up once."""

    name: str
    config: DVoRAConfig
    layers: Mapping[str, DVoRALayer]
    """By the names that files have for them, in the order of a vector."""
    whole: Mapping[str, Tensor]
    """What is saved whole, not copied, in the order of a vector."""

    @classmethod
    def of(cls, model: nn.Module, adapter_name: str) -> ModelAdapter:
        """Look an adapter up, also in a model that is compiled or wrapped.

        Raises:
            TypeError, ValueError: there is no such adapter, or it is of another method.
        """
        base = _adapted_base(model)
        config = _config_in(base, adapter_name)
        layers = {plain_name(layer.name): layer for layer in layers_of(base, adapter_name)}
        whole = _whole_in(base, adapter_name, config)
        return cls(adapter_name, config, _by_name(layers), _by_name(whole))

    def content(self) -> Content:
        """What it consists of."""
        adapted = [(name, layer.adapted(self.name)) for name, layer in self.layers.items()]
        return Content(
            Settings.of(self.config),
            tuple(LayerSizes(name, a.out_features, a.rank, a.scaling) for name, a in adapted),
            tuple(SavedWhole(name, tuple(tensor.shape)) for name, tensor in self.whole.items()),
            tuple((name, tuple(layer.present_fingerprint())) for name, layer in self.layers.items()),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Its values, detached and not copied, by name in the order of a vector."""
        vectors = {
            f"{name}{VECTOR_PREFIX}{vector}": by_adapter[self.name].detach()
            for name, layer in self.layers.items()
            for vector, by_adapter in zip(Vectors._fields, layer.vector_dicts(), strict=True)
            if self.name in by_adapter
        }
        return {**vectors, **self.whole}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """The values in a folder, on the CPU, by name in the order of a vector."""
    return in_order(load_peft_weights(str(folder), device="cpu"), _config_of(folder))


def in_order(saved: Mapping[str, Tensor], config: DVoRAConfig) -> dict[str, Tensor]:
    """The values in a file that are the adapter's own, by name in the order of a vector."""
    vectors = {_plain(key): tensor for key, tensor in saved.items() if _is_vector(key)}
    layers = sorted({name.rpartition(VECTOR_PREFIX)[0] for name in vectors})
    names = [f"{layer}{VECTOR_PREFIX}{vector}" for layer in layers for vector in Vectors._fields]
    whole = {_plain(key): tensor for key, tensor in saved.items() if _is_trained_whole(key, config)}
    return {name: vectors[name] for name in names if name in vectors} | _by_name(whole)


def _adapted_base(model: nn.Module) -> nn.Module:
    """The model that PEFT has put adapters into, within whatever is around it; names in files are relative to it."""
    holder = next((module for module in model.modules() if vars(module).get("peft_config")), model)
    return holder.model if isinstance(holder, BaseTuner) else holder


def _config_in(base: nn.Module, adapter_name: str) -> DVoRAConfig:
    configs: Any = vars(base).get("peft_config", {})
    if adapter_name not in configs:
        raise ValueError(
            f"adapter_name: there is no adapter {adapter_name!r} in the model of type {type(base).__name__}, only "
            f"{sorted(configs)}; pass the name of one of these, or adapt the model first"
        )
    return _own(configs[adapter_name], f"adapter_name: {adapter_name!r} in the model")


def _config_of(folder: Path) -> DVoRAConfig:
    if not (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"source: {folder} is no folder with a saved adapter: it has no adapter_config.json. Pass what "
            "save_pretrained wrote (a folder for each adapter that is not named 'default'), downloaded first"
        )
    return _own(DVoRAConfig.from_pretrained(str(folder)), f"source: {folder}")


def _own(config: PeftConfig, what: str) -> DVoRAConfig:
    if not isinstance(config, DVoRAConfig):
        raise TypeError(f"{what} is an adapter of type {config.peft_type}; only DVoRA adapters have flat vectors")
    return config


def _shapes_of(config: DVoRAConfig, folder: Path) -> Mapping[str, Shape]:
    shapes = None if config.file is None else config.file.shapes
    if not shapes:
        raise ValueError(f"source: {folder} has a configuration and no file of values; save the adapter again")
    check_file(config)
    return shapes


def _sizes(name: str, shapes: Mapping[str, Shape], config: DVoRAConfig) -> LayerSizes:
    """The sizes of a layer whose vectors have these shapes in a file."""
    out, rank = (prod(shapes.get(vector, (0,))) for vector in ("magnitude", "lambda_d"))
    alpha = config.alpha_of(name)
    sizes = LayerSizes(name, out, rank, 0.0 if not rank else 1.0 if alpha is None else alpha / rank)
    if shapes != {v: (length,) for v, length in zip(Vectors._fields, sizes.lengths, strict=True) if length}:
        raise ValueError(
            f"source: {name} has vectors {dict(shapes)} in the adapter's file, expected magnitude (O,), lambda_b (O,) "
            "and lambda_d (R,), or a magnitude only; the file is damaged"
        )
    return sizes


def _whole_in(base: nn.Module, adapter_name: str, config: DVoRAConfig) -> dict[str, Tensor]:
    """What an adapter in a model has beside its vectors, by the names in files without prefixes."""
    found: dict[str, Tensor] = {}
    if config.bias != "none":
        found |= BaseTuner._get_learnable_bias_state_dict(base, outside_saved_modules(base), config)
    if config.modules_to_save or config.trainable_token_indices:
        values = base.state_dict()
        for path, module in base.named_modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                keys = module.adapter_state_dict_load_map(adapter_name)
                found |= {f"{path}.{saved}": values[f"{path}.{own}"] for saved, own in keys.items()}
    return {_plain(key): value for key, value in found.items()}


def _is_vector(key: str) -> bool:
    return VECTOR_PREFIX in key and not key.startswith(MATRIX_PREFIX)


def _is_trained_whole(key: str, config: DVoRAConfig) -> bool:
    """Whether a key of a file is of something trained whole; files may also have tables and biases of the base."""
    if _is_vector(key) or key.startswith(MATRIX_PREFIX) or OF_SAVED_MODULES.search(key):
        return False
    return (
        ".trainable_tokens_delta" in key
        or (config.bias != "none" and key.endswith(".bias"))
        or any(f".{module}." in f".{key}" for module in config.modules_to_save or ())
    )


def _plain(key: str) -> str:
    return plain_name(key.removeprefix(PEFT_PREFIX))


def _by_name(named: Mapping[str, _Named]) -> dict[str, _Named]:
    return {name: named[name] for name in sorted(named)}


def _in_words(each: LayerSizes | SavedWhole | None) -> str:
    if each is None:
        return "absent"
    return ", ".join(f"{field} {value}" for field, value in each._asdict().items() if field != "name")
