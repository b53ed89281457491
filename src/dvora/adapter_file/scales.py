"""The scales of (IA)3 and RoAd as PEFT saves them: of inputs or outputs, or of pairs of outputs, which they rotate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from peft import IA3Config, RoadConfig

from .content import FactorSizes
from .values_file import Shape

_COLUMNS = {"road_1": 1, "road_2": 2, "road_4": 4}
"""Of values for each pair of outputs."""


def ia3_sizes(shapes: Mapping[str, Sequence[Shape]], _: IA3Config) -> list[FactorSizes]:
    """What a file of (IA)3 has of each layer; its shape says whether that is of inputs (`feedforward_modules`).

    Raises:
        ValueError: a layer is not linear, or has one input or output.
    """
    sizes = []
    for name, (shape,) in shapes.items():
        if len(shape) != 2 or not min(shape) == 1 < max(shape):
            raise ValueError(f"{name} has scales of shape {shape}, expected (out, 1) or (1, in) of a linear layer")
        rows, columns = (size if size > 1 else None for size in shape)
        sizes.append(FactorSizes(name, "ia3", columns, rows))
    return sizes


def road_sizes(shapes: Mapping[str, Sequence[Shape]], config: RoadConfig) -> list[FactorSizes]:
    """What a file of RoAd has of each layer.

    Raises:
        ValueError: a layer has not as many values as its groups have.
    """
    variant, size = config.variant, config.group_size
    in_group = _COLUMNS[variant] * size // 2 if type(size) is int else 0
    sizes = []
    for name, (theta, alpha) in shapes.items():
        if not in_group or theta != alpha or len(theta) != 1 or not theta[0] or theta[0] % in_group:
            raise ValueError(
                f"{name} has angles of shape {theta} and scales of shape {alpha}, expected {in_group} for each group "
                f"of variant={variant!r} and group_size={size!r}; save the adapter again"
            )
        sizes.append(FactorSizes(name, "road", None, theta[0] // in_group * size, 0, (variant, size)))
    return sizes
