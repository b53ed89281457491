"""What an adapter consists of, beside its values, and where each of them stands in a vector.

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
from collections.abc import Collection, Mapping
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple, TypeVar

from ..functional import Vectors
from .fingerprint import alike
from .patterns import check_expressions
from .settings import DVoRAConfig
from .values_file import (
    OF_SAVED_MODULES,
    VECTOR_PREFIX,
    Shape,
    is_vector,
    layer_and_vector,
    plain_key,
    plain_name,
)

FORMAT_VERSION = 1
"""Of the order of a vector's entries and of what the digest covers."""
_Value = TypeVar("_Value")


def vector_digest(layout: str | bytes, *data: bytes | memoryview) -> str:
    """32 hexadecimal digits that name values: of what they are (a layout's digest, say), and their bytes.

    Args:
        layout: what they are.
        data: the values; those of a flat vector are little-endian float32.
    """
    digest = hashlib.sha256(layout.encode() if isinstance(layout, str) else layout)
    for part in data:
        digest.update(part)
    return digest.hexdigest()[:32]


class LayerSizes(NamedTuple):
    """The vectors of one layer: how many entries, and on what scale."""

    name: str
    out_features: int
    rank: int
    """0 for a layer that has the magnitude only."""
    scaling: float
    """alpha / rank."""
    groups: int = 1
    """Of columns, each with a lambda_d of its own."""

    @property
    def lengths(self) -> tuple[int, int, int]:
        """Of magnitude, lambda_b and lambda_d."""
        return self.out_features, self.out_features if self.rank else 0, self.groups * self.rank

    @property
    def shapes(self) -> dict[str, Shape]:
        """Of the vectors that it has, in a file."""
        rows, by_groups = (self.out_features,), () if self.groups == 1 else (self.groups,)
        lambdas: dict[str, Shape] = {"lambda_b": rows, "lambda_d": (*by_groups, self.rank)}
        return {"magnitude": rows, **(lambdas if self.rank else {})}

    @property
    def entries(self) -> list[str | float]:
        """As JSON has them: of one group, what they were before there were groups."""
        return list(self if self.groups > 1 else self[:4])


class LowRankSizes(NamedTuple):
    """The factors of one linear layer in an adapter of LoRA."""

    name: str
    in_features: int
    out_features: int
    rank: int
    scaling: float

    @property
    def size(self) -> int:
        """How many values they have."""
        return self.rank * (self.in_features + self.out_features)


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
    factors: tuple[LowRankSizes, ...] = ()
    """Of an adapter of LoRA, which has no `layers`."""

    @classmethod
    def of_saved(cls, config: DVoRAConfig, shapes: Mapping[str, Shape]) -> Content:
        """That of a saved adapter with this configuration and values of these shapes."""
        vectors: dict[str, dict[str, Shape]] = {}
        for key in filter(is_vector, shapes):
            layer, vector = layer_and_vector(key)
            vectors.setdefault(plain_name(layer), {})[vector] = shapes[key]
        whole = {plain_key(key): shapes[key] for key in shapes if is_trained_whole(key, config)}
        return cls(
            CommonSettings.of(config),
            tuple(_sizes(name, vectors[name], config) for name in sorted(vectors)),
            tuple(SavedWhole(name, whole[name]) for name in sorted(whole)),
            tuple(sorted((plain_name(name), tuple(probes)) for name, probes in (config.base_probes or {}).items())),
        )

    @property
    def method(self) -> str:
        """In lower case."""
        return "lora" if self.factors else "dvora"

    @property
    def digest(self) -> str:
        """A hash of all that must be equal to the last bit; the base is compared by `difference`."""
        layers = [layer.entries for layer in self.layers]
        exact = [FORMAT_VERSION, self.settings, layers, self.whole, *([self.factors] if self.factors else ())]
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
            "layers": [layer.entries for layer in self.layers],
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
            sizes = [n for layer in content.layers for n in (layer.out_features, layer.rank, layer.groups - 1)]
            sizes += [n for part in content.whole for n in part.shape]
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


def in_order(saved: Mapping[str, _Value], config: DVoRAConfig) -> dict[str, _Value]:
    """The values in a file that are the adapter's own, by name in the order of a vector."""
    vectors = {plain_key(key): value for key, value in saved.items() if is_vector(key)}
    layers = sorted({name.rpartition(VECTOR_PREFIX)[0] for name in vectors})
    names = [f"{layer}{VECTOR_PREFIX}{vector}" for layer in layers for vector in Vectors._fields]
    whole = {plain_key(key): value for key, value in saved.items() if is_trained_whole(key, config)}
    return {name: vectors[name] for name in names if name in vectors} | {name: whole[name] for name in sorted(whole)}


def check_saved_ranks(config: DVoRAConfig, shapes: Mapping[str, Shape]) -> None:
    """Refuse values of other ranks than their configuration says, before anything of that rank is made.

    Raises:
        ValueError: a rank differs, or finding it out takes too long.
    """
    layers = {key: layer_and_vector(key)[0] for key in shapes if key.endswith(f"{VECTOR_PREFIX}lambda_d")}
    check_expressions(vars(config), {*layers.values(), *map(plain_name, layers.values())})
    for key, layer in layers.items():
        shape, groups = shapes[key], config.lambda_d_groups
        by_groups = () if groups == 1 else (groups,)
        expected = (*by_groups, config.rank_of(plain_name(layer)))
        if shape not in (expected, (*by_groups, config.rank_of(layer))):
            raise ValueError(
                f"{key} has shape {shape} in the adapter and {expected} in its configuration: another rank than the "
                "configuration says, in its r or rank_pattern, or other lambda_d_groups"
            )


def _sizes(name: str, shapes: Mapping[str, Shape], config: DVoRAConfig) -> LayerSizes:
    """The sizes of a layer whose vectors have these shapes in a file."""
    out, rank = prod(shapes.get("magnitude", (0,))), prod(shapes.get("lambda_d", (0,))[-1:])
    alpha = config.alpha_of(name)
    scaling = 0.0 if not rank else 1.0 if alpha is None else alpha / rank
    sizes = LayerSizes(name, out, rank, scaling, config.lambda_d_groups if rank else 1)
    if shapes != sizes.shapes:
        raise ValueError(
            f"source: {name} has vectors {dict(shapes)} in the adapter's file, expected magnitude (O,), lambda_b (O,) "
            "and lambda_d (R,), or (G, R) for lambda_d_groups=G, or a magnitude only; the file is damaged"
        )
    return sizes


def is_trained_whole(key: str, config: DVoRAConfig) -> bool:
    """Whether a key of a file is of something trained whole; files may also have tables and biases of the base."""
    if VECTOR_PREFIX in key or OF_SAVED_MODULES.search(key):
        return False
    return (
        ".trainable_tokens_delta" in key
        or (config.bias != "none" and key.endswith(".bias"))
        or head_of(plain_key(key), config.modules_to_save) is not None
    )


def head_of(value: str, names: Collection[str] | None) -> str | None:
    """The module around a value of the base that is trained and saved whole; None: there is none.

    Args:
        value: its name.
        names: of `modules_to_save`. PEFT compares the ends of letters, not of parts of a path: `classifier` is also
            `pre_classifier`.
    """
    modules = accumulate(value.split(".")[:-1], "{}.{}".format)
    return next((module for module in modules if module.endswith(tuple(names or ()))), None)


def _in_words(part: LayerSizes | SavedWhole | None) -> str:
    if part is None:
        return "absent"
    entries = {field: value for field, value in part._asdict().items() if (field, value) != ("groups", 1)}
    return ", ".join(f"{field} {value}" for field, value in entries.items() if field != "name")
