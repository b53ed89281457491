"""The names of an adapter's values in files."""

import re

PEFT_PREFIX = "base_model.model."
VECTOR_PREFIX = ".dvora_"
MATRIX_PREFIX = "base_model.dvora_projections."
"""Of entries that files of earlier versions may have, and nothing reads: the matrices, which the seed makes."""
OF_SAVED_MODULES = re.compile(r"\.(modules_to_save|original_module)\.")


def layer_and_vector(key: str) -> tuple[str, str]:
    """A key of a file as the name of the layer in it, and that of the vector without its prefix."""
    layer, _, vector = key.removeprefix(PEFT_PREFIX).rpartition(VECTOR_PREFIX)
    return layer, vector


def plain_name(name: str) -> str:
    """A layer's name without the modules that some models have around their layers."""
    for around in ("_orig_mod.", "_fsdp_wrapped_module.", "base_layer."):
        name = name.replace(around, "")
    return name


def plain_key(key: str) -> str:
    """A key of a file by the name that its value would have in the bare base model."""
    return plain_name(key.removeprefix(PEFT_PREFIX))


def is_vector(key: str) -> bool:
    """Whether an entry of a file is a vector of a layer."""
    return VECTOR_PREFIX in key and not key.startswith(MATRIX_PREFIX)
