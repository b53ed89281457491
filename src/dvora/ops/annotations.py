"""Shape annotations of the mathematics: jaxtyping's where it is installed, plain documentation elsewhere.

jaxtyping is a tool of the tests, which check every annotation; a user of the layer needs torch and numpy only.
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
