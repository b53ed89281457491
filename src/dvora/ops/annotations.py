"""Shape annotations: jaxtyping's where it is installed, documentation only where it is not.

The tests install jaxtyping and check every annotation; users need torch and numpy only.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Float
else:
    try:
        from jaxtyping import Float
    except ImportError:

        class Float:
            """Stands in for `jaxtyping.Float`: `Float[Tensor, "O I"]` is just `Tensor`."""

            def __class_getitem__(cls, item):
                return item[0]


__all__ = ["Float"]
