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
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn

from ..functional import Vectors
from .base_weight import alike, change, warn_of_changes
from .config import DVoRAConfig, Shape
from .injecting import restored_on_error
from .layer import DVoRALayer, layers_of
from .saving import (
    MATRIX_PREFIX,
    OF_SAVED_MODULES,
    VECTOR_PREFIX,
    check_file,
    check_folder,
    check_unsharded,
    is_vector,
    layer_and_vector,
    plain_key,
    plain_name,
    shapes_of,
    trained_whole,
)

FORMAT_VERSION = 1
"""Of the order of a vector's entries and of what the digest covers."""
ModelOrFolder = nn.Module | str | os.PathLike[str]
"""A model with the adapter, or the folder of a saved one."""
_Value = TypeVar("_Value")


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


class CommonSettings(NamedTuple):
    """What all layers of an adapter have in common."""

    direction: str
    projection_seed: int
    projection_init: str
    projection_fingerprint: str | None
    tokens: tuple[tuple[str, tuple[int, ...]], ...]
    """Indices by the layer's name; "" is the input embeddings."""

    @classmethod
    def of(cls, config: DVoRAConfig) -> CommonSettings:
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

    settings: CommonSettings
    layers: tuple[LayerSizes, ...]
    whole: tuple[SavedWhole, ...]
    base: tuple[tuple[str, tuple[float, ...]], ...]
    """Fingerprints of the base weights by layer, where they are known."""

    @classmethod
    def of(cls, source: ModelOrFolder, adapter_name: str) -> Content:
        """That of an adapter in a model, or of the one in a folder."""
        if isinstance(source, nn.Module):
            return ModelAdapter.of(source, adapter_name).content()
        if isinstance(source, str | os.PathLike):
            return cls.of_folder(Path(source))
        raise TypeError(f"source must be a model or the folder of an adapter, got {type(source).__name__}")

    @classmethod
    def of_folder(cls, folder: Path) -> Content:
        """That of a saved adapter: its configuration, and names and shapes of its values; no value is read."""
        config = config_in_folder(folder)
        if not (shapes := shapes_of(config)):
            raise ValueError(f"source: {folder} has a configuration and no file of values; save the adapter again")
        check_file(config)
        return cls.of_saved(config, shapes)

    @classmethod
    def of_saved(cls, config: DVoRAConfig, shapes: Mapping[str, Shape]) -> Content:
        """That of a saved adapter with this configuration and values of these shapes."""
        vectors: dict[str, dict[str, Shape]] = {}
        for key in filter(is_vector, shapes):
            layer, vector = layer_and_vector(key)
            vectors.setdefault(plain_name(layer), {})[vector] = shapes[key]
        whole = {plain_key(key): shapes[key] for key in shapes if _is_trained_whole(key, config)}
        return cls(
            CommonSettings.of(config),
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
        for setting, ours, theirs in zip(CommonSettings._fields, self.settings, other.settings, strict=True):
            if ours != theirs:
                return f"{setting} is {ours!r:.200} here and {theirs!r:.200} there"
        here, there = self._by_name(), other._by_name()
        for name in sorted(here.keys() | there.keys()):
            if here.get(name) != there.get(name):
                return f"{name} is {_in_words(here.get(name))} here and {_in_words(there.get(name))} there"
        base = dict(other.base)
        for name, fingerprint in self.base:
            if name in base and not alike(list(base[name]), list(fingerprint)):
                return (
                    f"the base models differ: norm and random projections of the weight of {name} are "
                    f"{list(fingerprint)} here and {list(base[name])} there"
                )
        return None

    def to_dict(self) -> dict[str, Any]:
        """The content as what JSON has types for."""
        return {
            "format_version": FORMAT_VERSION,
            "digest": self.digest,
            "settings": self.settings._asdict(),
            "layers": [list(layer) for layer in self.layers],
            "whole": [[whole.name, list(whole.shape)] for whole in self.whole],
            "base": {name: list(fingerprint) for name, fingerprint in self.base},
        }

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> Content:
        """The content that `to_dict` has written."""
        version = entries.get("format_version") if isinstance(entries, Mapping) else None
        if version != FORMAT_VERSION:
            raise ValueError(
                f"settings: a layout of format_version {version!r:.100}, expected {FORMAT_VERSION}; make it again with "
                "Layout.of, with this version of dvora on both sides"
            )
        try:
            tokens = tuple((name, tuple(indices)) for name, indices in entries["settings"]["tokens"])
            content = cls(
                CommonSettings(**{**entries["settings"], "tokens": tokens}),
                tuple(LayerSizes(*layer) for layer in entries["layers"]),
                tuple(SavedWhole(name, tuple(shape)) for name, shape in entries["whole"]),
                tuple((name, tuple(fingerprint)) for name, fingerprint in entries["base"].items()),
            )
            digest = entries["digest"]
            sizes = [n for layer in content.layers for n in layer[1:3]] + [n for part in content.whole for n in part[1]]
            if not all(type(n) is int and n >= 0 for n in sizes):
                raise ValueError("sizes are whole numbers")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"settings: no layout can be read from it ({error!r:.200}); make it again") from error
        if content.digest != digest:
            raise ValueError(
                f"settings: its digest is {digest!r:.100}, and that of its entries {content.digest!r}; it was changed "
                "on the way, make it again with Layout.of"
            )
        return content

    def _by_name(self) -> dict[str, LayerSizes | SavedWhole]:
        return {**{layer.name: layer for layer in self.layers}, **{whole.name: whole for whole in self.whole}}


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
        """Look an adapter up, also in a model that is compiled or wrapped."""
        base = _adapted_model(model)
        configs: Any = vars(base).get("peft_config", {})
        if adapter_name not in configs:
            raise ValueError(
                f"adapter_name: there is no adapter {adapter_name!r} in the model of type {type(base).__name__}, only "
                f"{sorted(configs)}; pass the name of one of these, or adapt the model first"
            )
        config = _of_dvora(configs[adapter_name], f"adapter_name: {adapter_name!r} in the model")
        layers = {plain_name(layer.name): layer for layer in layers_of(base, adapter_name)}
        whole = {plain_key(key): value for key, value in trained_whole(base, config, adapter_name, saved=True).items()}
        return cls(adapter_name, config, dict(sorted(layers.items())), {name: whole[name] for name in sorted(whole)})

    def content(self) -> Content:
        """What it consists of."""
        adapted = [(name, layer.adapted(self.name)) for name, layer in self.layers.items()]
        return Content(
            CommonSettings.of(self.config),
            tuple(LayerSizes(name, a.out_features, a.rank, a.scaling) for name, a in adapted),
            tuple(SavedWhole(name, tuple(tensor.shape)) for name, tensor in self.whole.items()),
            tuple((name, tuple(layer.present_fingerprint())) for name, layer in self.layers.items()),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Its values, detached and not copied, by name in the order of a vector, if this process has all of them."""
        vectors = {
            f"{name}{VECTOR_PREFIX}{vector}": by_adapter[self.name].detach()
            for name, layer in self.layers.items()
            for vector, by_adapter in zip(Vectors._fields, layer.vector_dicts(), strict=True)
            if self.name in by_adapter
        }
        tensors = {**vectors, **self.whole}
        check_unsharded(tensors)
        if absent := [name for name, tensor in tensors.items() if tensor.is_meta]:
            raise ValueError(f"model: {absent[0]} is on the meta device and has no values yet; load the adapter first")
        return tensors


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """The values in a folder, on the CPU, by name in the order of a vector."""
    return in_order(load_peft_weights(str(folder), device="cpu"), config_in_folder(folder))


def in_order(saved: Mapping[str, _Value], config: DVoRAConfig) -> dict[str, _Value]:
    """The values in a file that are the adapter's own, by name in the order of a vector."""
    vectors = {plain_key(key): value for key, value in saved.items() if is_vector(key)}
    layers = sorted({name.rpartition(VECTOR_PREFIX)[0] for name in vectors})
    names = [f"{layer}{VECTOR_PREFIX}{vector}" for layer in layers for vector in Vectors._fields]
    whole = {plain_key(key): value for key, value in saved.items() if _is_trained_whole(key, config)}
    return {name: vectors[name] for name in names if name in vectors} | {name: whole[name] for name in sorted(whole)}


def hotswap_adapter(model: nn.Module, folder: str | Path, adapter_name: str = "default") -> None:
    """Copy the values of a saved adapter over those of a loaded one, in place.

    Parameters stay the same objects, so optimizers and compiled models keep working.

    Args:
        model: a PEFT model, compiled or not, or a model with injected adapters.
        folder: of the saved adapter, which must be made for the same layers with the same ranks, scales, direction and
            projections.
        adapter_name: of the adapter to overwrite.

    Raises:
        TypeError: the folder holds an adapter of another method.
        ValueError: the adapters differ in more than their values, the adapter is merged, it is for another base, or the
            folder is damaged; nothing is changed.
    """
    model = getattr(model, "_orig_mod", model)  # a compiled model's own
    adapter = ModelAdapter.of(model, adapter_name)
    config = config_in_folder(Path(folder))
    if difference := adapter.content().difference(Content.of_folder(Path(folder))):
        raise ValueError(
            f"adapter {adapter_name!r} of the model cannot take the values in {folder}: {difference}. Load them under "
            "a name of their own instead"
        )
    layers, probes = list(adapter.layers.values()), config.base_probes or {}
    warn_of_changes({x.name: change(x.fingerprint, probes[x.name]) for x in layers if x.name in probes})
    # With its own configuration: what that does not train must be the model's already, as in loading.
    check_folder(_adapted_model(model), config, adapter_name)
    values = load_peft_weights(str(folder), device="cpu")
    with restored_on_error(model), values_restored_on_error(list(adapter.tensors().values())):
        set_peft_model_state_dict(model, values, adapter_name)
        for layer in layers:
            layer.set_strength(adapter_name, float(config.strength_of(layer.name)))
        adapter.config.strength = config.strength


@contextmanager
def values_restored_on_error(tensors: Sequence[Tensor]) -> Iterator[None]:
    """If anything is raised in the block, give the tensors the values back that they have now."""
    values = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            torch._foreach_copy_(list(tensors), values)
        raise


def _adapted_model(model: nn.Module) -> nn.Module:
    """The model that PEFT has put adapters into, to which names in files are relative, within what is around it."""
    holder = next((module for module in model.modules() if vars(module).get("peft_config")), model)
    base: nn.Module = holder.model if isinstance(holder, BaseTuner) else holder
    return base


def config_in_folder(folder: Path) -> DVoRAConfig:
    """The configuration of a saved adapter."""
    if not (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"source: {folder} is no folder with a saved adapter: it has no adapter_config.json. Pass what "
            "save_pretrained wrote (a folder for each adapter that is not named 'default'), downloaded first"
        )
    return _of_dvora(DVoRAConfig.from_pretrained(str(folder)), f"source: {folder}")


def _of_dvora(config: PeftConfig, what: str) -> DVoRAConfig:
    if not isinstance(config, DVoRAConfig):
        raise TypeError(f"{what} is an adapter of type {config.peft_type}; only DVoRA adapters are read here")
    return config


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


def _is_trained_whole(key: str, config: DVoRAConfig) -> bool:
    """Whether a key of a file is of something trained whole; files may also have tables and biases of the base."""
    if VECTOR_PREFIX in key or key.startswith(MATRIX_PREFIX) or OF_SAVED_MODULES.search(key):
        return False
    return (
        ".trainable_tokens_delta" in key
        or (config.bias != "none" and key.endswith(".bias"))
        or any(f".{module}." in f".{key}" for module in config.modules_to_save or ())
    )


def _in_words(part: LayerSizes | SavedWhole | None) -> str:
    if part is None:
        return "absent"
    return ", ".join(f"{field} {value}" for field, value in part._asdict().items() if field != "name")
