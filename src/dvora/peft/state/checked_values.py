"""The one place where a saved adapter is checked: its names, shapes and values, each as early as possible.

1. `check_file`: names and shapes of the file against the configuration; there is no model yet.
2. `check_ranks`, `check_fits`: against the weights that a model would have adapted; nothing of it has changed yet.
3. `checked_values`: the values against the adapter that is in the model now; nothing has been copied yet.
4. `check_load`: shapes of all that torch is about to copy; torch itself would stop after copying a part.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from itertools import chain

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ...checks import FAR, MAX_RANK
from ...functional import Vectors
from ...matrices.interface import SharedProjections
from ...tensors import weight_in_memory
from ..adapter_folder import (
    MATRIX_PREFIX,
    PEFT_PREFIX,
    VECTOR_PREFIX,
    Shape,
    check_dense,
    layer_and_vector,
    layers_named,
    plain_name,
)
from ..config import DVoRAConfig
from ..expressions import check_expressions
from ..layer import VECTORS, DVoRALayer, layers_in

_VECTOR = re.compile(r"\.(" + "|".join(VECTORS) + r")(\.|$)")
_SECOND_BIAS = re.compile(r"\.(modules_to_save|original_module)\.(.*\.)?bias$")
OF_SAVED_MODULES = re.compile(r"\.(modules_to_save|original_module)\.")


def check_file(config: DVoRAConfig) -> None:
    """Refuse a file of other values than its configuration says; does nothing without a file.

    Ranks are compared before anything of that rank is made. PEFT would notice missing tokens after it has changed the
    model, and superfluous biases not at all.

    Raises:
        ValueError: values are missing, not trained, or of another rank.
    """
    if config.file is None or not (shapes := config.file.shapes):
        return
    adapted = {key.rpartition(VECTOR_PREFIX)[0] for key in shapes}
    trained = {f"{layer}.base_layer.bias" for layer in adapted} if config.bias == "dvora_only" else set()
    for key in () if config.bias == "all" else shapes:
        saved_whole = any(f".{module}." in key for module in config.modules_to_save or ())
        if key.endswith(".bias") and key not in trained and not saved_whole:
            raise ValueError(
                f"the adapter's file has {key!r}, which its configuration does not train (bias={config.bias!r})"
            )
    tokens = config.trainable_token_indices
    if tokens is not None and not any(".trainable_tokens_delta" in key for key in shapes):
        raise ValueError(
            f"the adapter's file lacks the tokens that trainable_token_indices={tokens!r:.200} says it trains"
        )
    check_expressions(vars(config), layers_named(shapes))
    for key, shape in shapes.items():
        layer, vector = layer_and_vector(key)
        rank = config.rank_of(plain_name(layer))
        if vector == "lambda_d" and shape not in ((rank,), (config.rank_of(layer),)):
            raise ValueError(
                f"{key} has shape {shape} in the adapter and {(rank,)} in its configuration: another rank than the "
                "configuration says, in its r or rank_pattern"
            )


def check_ranks(config: DVoRAConfig, ranks: Mapping[str, int]) -> None:
    """Refuse ranks that no vector in the configuration's file has, before anything of that rank is made.

    Args:
        config: of the adapter.
        ranks: of the weights to adapt, by name.

    Raises:
        ValueError: a rank is larger.
    """
    if config.file is None or (shapes := config.file.shapes) is None:
        return
    longest = max(chain((0,), *(shape for key, shape in shapes.items() if key.endswith(f"{VECTOR_PREFIX}lambda_d"))))
    for name, rank in ranks.items():
        if rank > longest:
            raise ValueError(
                f"the adapter lacks vectors of adapted layers: {name} has rank {rank} in its configuration, and no "
                f"lambda_d in its file has more than {longest} values"
            )


def check_fits(config: DVoRAConfig, sizes: Mapping[str, tuple[int, int]], whole: Mapping[str, nn.Module]) -> None:
    """Refuse a file of other vectors or heads than a model needs.

    Args:
        config: of the adapter; without a file, or with one whose names PEFT converts, nothing is checked.
        sizes: output features and rank of every weight to adapt, by name; at rank 0 it has a magnitude only.
        whole: modules to train and save whole, by name.

    Raises:
        ValueError: vectors or modules are missing, of layers that are not adapted, or of another shape.
    """
    shapes = (config.file.shapes if config.file else None) or {}
    if not layers_named(shapes) & sizes.keys():
        return
    vectors = [key for key in shapes if VECTOR_PREFIX in key and not key.startswith(MATRIX_PREFIX)]
    held = {
        f"{plain_name(layer)}{VECTOR_PREFIX}{v}": shapes[key] for key in vectors for layer, v in [layer_and_vector(key)]
    }
    needed: dict[str, Shape] = {}
    for name, (out_features, rank) in sizes.items():
        own = {"magnitude": (out_features,), "lambda_b": (out_features,), "lambda_d": (rank,)}
        needed |= {f"{plain_name(name)}{VECTOR_PREFIX}{v}": own[v] for v in own if rank or v == "magnitude"}
    _check_same_names(held.keys(), needed.keys())
    for key, shape in held.items():
        _check_shape(key, shape, needed[key])
    for name, module in whole.items():
        if missing := [key for key in module.state_dict() if f"{PEFT_PREFIX}{name}.{key}" not in shapes]:
            raise ValueError(
                f"the adapter's file lacks {name}.{missing[0]}, which modules_to_save={config.modules_to_save!r} says "
                "it trains"
            )


def check_matrices(matrices: Mapping[str, Tensor], projections: SharedProjections) -> None:
    """Refuse the projections of a file if they are not those that a model makes from their seed.

    Args:
        matrices: of the file, by name.
        projections: of the model.

    Raises:
        ValueError: they differ, or are larger than any that could be used.
    """
    for name, matrix in matrices.items():
        check_dense(name, matrix)
        if matrix.dim() and len(matrix) > MAX_RANK:
            raise ValueError(f"the saved projection matrix {name} has {len(matrix)} rows; no rank is above {MAX_RANK}")
    projections.check_saved_tensors(dict(matrices))


def check_whole(vectors: Mapping[str, Tensor]) -> None:
    """Refuse to save the shards of vectors: gathering them here would never end where one process saves alone.

    Raises:
        ValueError: this process has a shard of a vector only.
    """
    for key, vector in vectors.items():
        if not vector.numel() or type(vector) not in (Tensor, nn.Parameter):
            raise ValueError(
                f"{key} is sharded between the processes ({type(vector).__name__}, {tuple(vector.shape)}). Gather on "
                "every rank first: under FSDP pass state_dict=get_model_state_dict(model, options=StateDictOptions("
                "full_state_dict=True)) of torch.distributed.checkpoint.state_dict; under DeepSpeed ZeRO-3 save within "
                "deepspeed.zero.GatheredParameters(list(model.parameters()))"
            )


def checked_values(
    model: nn.Module,
    adapter_name: str,
    state_dict: Mapping[str, Tensor],
    biases: Collection[str],
    config: DVoRAConfig,
) -> dict[str, Tensor]:
    """The entries of a loaded state dict in the model's own dtypes, checked but for their shapes.

    Only what the adapter's configuration trains is returned: what else the state dict has of the model must be what the
    model has already.

    Args:
        model: with the adapter injected.
        adapter_name: its name.
        state_dict: keys as in the model's own state dict, those of biases perhaps with PEFT's prefix.
        biases: names of the biases that the adapter trains.
        config: of the adapter.

    Raises:
        ValueError: a value is missing, belongs to nothing that the adapter trains, is not floating or not finite, or
            vectors give some row no finite factors.
    """
    values = model.state_dict()
    own = {key for key in values if _VECTOR.search(key) and key.endswith(f".{adapter_name}")}
    trained = {*own, *biases, *_saved_whole(model, adapter_name)}
    loaded = {key if key in values else key.removeprefix(PEFT_PREFIX): value for key, value in state_dict.items()}
    # Biases of a state dict that was not read from a folder are accepted, as PEFT does.
    made_here = config.file is None
    trained |= {key for key in values if made_here and key.endswith(".bias") and not _SECOND_BIAS.search(key)}
    if config.bias == "all" or made_here:
        # PEFT saves those of modules_to_save a second time, under names that loading has no use for.
        loaded = {key: value for key, value in loaded.items() if key in trained or not _SECOND_BIAS.search(key)}
    unknown = [key for key in loaded if key not in values]
    _check_same_names({key for key in loaded if key in own or (key in unknown and _VECTOR.search(key))}, own)
    if missing := [key for key in biases if key not in loaded]:
        raise ValueError(f"the adapter lacks biases that its configuration trains: {_some(missing)}")
    if unknown:
        raise ValueError(
            f"the adapter's file has values that its configuration does not train: {_some(list(map(repr, unknown)))}"
        )
    for key, value in loaded.items():
        check_dense(key, value)
        if key not in trained:
            check_same_values(key, value, values[key])
    checked = {key: _checked_value(key, value, values[key]) for key, value in loaded.items() if key in trained}
    _check_factors(model, adapter_name, checked)
    return checked


def check_load(model: nn.Module, state_dict: Mapping[str, Tensor], prefix: str = "") -> None:
    """Refuse a state dict before any of it is copied: at a wrong shape torch would stop after copying a part.

    Args:
        model: with the adapters injected.
        state_dict: keys as in the model's own state dict, each after `prefix`.
        prefix: of the model's keys.

    Raises:
        ValueError: a value has another shape, or belongs to a weight with merged adapters, or to these.
    """
    for name, module in model.named_modules():
        if isinstance(module, DVoRALayer):
            module.check_loadable(state_dict, f"{prefix}{name}.")
    # Base weights may be packed, and are loaded by their layers in ways of their own.
    packed = {id(tensor) for layer in layers_in(model) for tensor in layer.get_base_layer().parameters()}
    for name, own in chain(model.named_parameters(), model.named_buffers()):
        loaded = state_dict.get(prefix + name)
        if loaded is not None and (id(own) not in packed or name.endswith(".bias")):
            _check_shape(prefix + name, loaded.shape, own.shape)


def vectors_among(keys: Collection[str]) -> set[str]:
    """The names of the adapters whose vectors are among the keys of a model's state dict."""
    return {key.rpartition(".")[2] for key in keys if _VECTOR.search(key)}


def outside_saved_modules(model: nn.Module) -> dict[str, Tensor]:
    """The model's values but those of `modules_to_save`, which are loaded under names of their own."""
    return {key: value for key, value in model.state_dict().items() if not OF_SAVED_MODULES.search(key)}


def _saved_whole(model: nn.Module, adapter_name: str) -> Iterator[str]:
    """Of modules and tokens that the adapter saves whole."""
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            yield from (f"{name}.{key}" for key in module.adapter_state_dict_load_map(adapter_name).values())


def _check_same_names(held: Collection[str], needed: Collection[str]) -> None:
    """Refuse vectors that are missing, or that no adapted layer has."""
    if others := sorted(set(held) - set(needed)):
        raise ValueError(f"the adapter has vectors for layers that are not adapted here: {_some(others)}")
    if missing := sorted(set(needed) - set(held)):
        raise ValueError(f"the adapter lacks vectors of adapted layers: {_some(missing)}")


def _check_shape(key: str, shape: Shape, expected: Shape) -> None:
    if tuple(shape) != tuple(expected):
        raise ValueError(
            f"{key} has shape {tuple(shape)} in the adapter and {tuple(expected)} in the model: another base model, or "
            "another rank than the configuration says; neither can be changed by loading"
        )


def _check_factors(model: nn.Module, adapter_name: str, values: Mapping[str, Tensor]) -> None:
    """Refuse finite vectors that give some row no finite factors.

    Args:
        model: with the adapter injected.
        adapter_name: its name.
        values: checked, with keys as in the model's own state dict.

    Raises:
        ValueError: a layer has such vectors.
    """
    for path, layer in model.named_modules():
        if not isinstance(layer, DVoRALayer) or adapter_name not in layer.dvora_adapted:
            continue
        own = layer.vectors(adapter_name)
        keys = (f"{path}.{vector}.{adapter_name}" for vector in VECTORS)
        loaded = Vectors(*(values.get(key, vector) for key, vector in zip(keys, own, strict=True)))
        check_layer_factors(layer, adapter_name, loaded)


@torch.no_grad()
def check_layer_factors(layer: DVoRALayer, adapter_name: str, vectors: Vectors) -> None:
    """Refuse finite vectors that give some row of a layer no finite factors.

    Raises:
        ValueError: they do.
    """
    if not any(not vector.is_meta and vector.numel() and vector.abs().max() > FAR for vector in vectors):
        return
    adapted = layer.adapted(adapter_name)
    weight = weight_in_memory(layer.get_base_layer(), layer.parameter_name) if layer.layer_type.has_weight else None
    if not adapted.factors(Vectors(*(vector.to(adapted.w) for vector in vectors)), weight).are_finite():
        raise ValueError(
            f"{layer.name}: magnitude, lambda_b and lambda_d in the adapter are so large that outputs would not be "
            "finite; the values are damaged or training diverged"
        )


def check_same_values(key: str, loaded: Tensor, own: Tensor) -> None:
    """Refuse values that the adapter does not train, unless they are the model's: PEFT writes tables of embeddings.

    Raises:
        ValueError: they differ.
    """
    # Where this process does not have them, they cannot be compared, and are left alone all the same.
    at_hand = type(own) in (Tensor, nn.Parameter) and not own.is_meta
    if at_hand and not (loaded.shape == own.shape and _same(loaded.to(own), own)):
        raise ValueError(
            f"the adapter's file has values that its configuration does not train: {key!r}, which differs from the "
            "model's own. Save a base that was changed (with further tokens, say) itself, and load the adapter onto "
            "that; or name the layer in modules_to_save or trainable_token_indices before training; or save the "
            "adapter with save_embedding_layers=False"
        )


def _same(a: Tensor, b: Tensor) -> bool:
    """To the last bit, as a table may hold what is not finite."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(tensor.detach().contiguous().flatten().view(torch.uint8) for tensor in (a, b)))


def _checked_value(key: str, loaded: Tensor, own: Tensor) -> Tensor:
    if own.is_floating_point() and not loaded.is_floating_point():
        raise ValueError(f"{key} has dtype {loaded.dtype} in the adapter, expected a floating-point vector")
    # Cast first: a finite float64 may be infinite in the model, and there is no `isfinite` for eight bits.
    cast = loaded.to(own.dtype)
    if not cast.isfinite().all():
        raise ValueError(
            f"{key} has values that are not finite in the adapter; the file is damaged or training diverged"
        )
    return cast


def _some(keys: list[str]) -> str:
    shown = ", ".join(keys[:3])
    return shown if len(keys) <= 3 else f"{shown} and {len(keys) - 3} more"
