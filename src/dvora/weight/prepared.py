"""An update without gradients, with all looked up that tokens do not decide: for few tokens that takes longest."""

from torch import Tensor

from ..matrices.shared_input import projected_in_pass
from ..ops.annotations import Float
from ..ops.passes import Pass
from .linear import Update, outputs_from, scaled_base, scaled_base_of


class PreparedUpdate:
    """What an update does to the outputs of a linear layer, in passes without gradients, autocast and tracing.

    Args:
        update: of a whole weight; it has a rank.
        x: inputs; others are to have their width, dtype and device.
    """

    __slots__ = (
        "_add",
        "_constant",
        "_factors",
        "_in_steps",
        "_matrices",
        "_on_cpu",
        "_project",
        "_rank",
        "_reader",
        "_shared",
        "dtype",
    )

    def __init__(self, update: Update, x: Float[Tensor, "*T I"]) -> None:
        adapted, self._factors, self._matrices = update.adapted, update.factors, update.matrices
        self._shared, self._rank, self._reader = adapted.shared, adapted.rank, id(adapted)
        self.dtype, self._on_cpu = x.dtype, x.is_cpu
        # Half precision is rounded once, and Triton's kernels do all at once.
        self._in_steps = x.dtype.itemsize >= 4 and not (self._matrices.use_triton and x.is_cuda)
        self._project = self._matrices.prepared_projection(self._rank, x.shape[-1], x.dtype, x.device)
        self._add = self._factors.added(self._matrices, x.dtype)
        constant = self._factors.packed.constant
        # Each by itself: taking one from both would be another call for every token.
        self._constant = None if constant is None else constant.unbind()

    def outputs(
        self, x: Float[Tensor, "*T I"], base_output: Float[Tensor, "*T O"], bias: Tensor | None, running: Pass
    ) -> Float[Tensor, "*T O"]:
        """The outputs from those of the base.

        Args:
            x: inputs.
            base_output: `x W^T + bias`.
            bias: the base's, or None.
            running: the pass.
        """
        if self._on_cpu and self._shared.share_inputs:
            z = projected_in_pass(x, self._rank, self._matrices, self._reader, self._project, running)
        else:
            z = self._shared.project_once(x, self._rank, self._reader)
        plain = base_output.is_contiguous() and base_output.dim() == x.dim() > 1
        if not self._in_steps or base_output.dtype is not self.dtype or not plain:
            # Of one token it has two dimensions.
            z = z.view(*x.shape[:-1], self._rank)
            return outputs_from(self._factors, self._matrices, base_output, z, bias)
        if self._constant is None:
            return self._add(z, scaled_base_of(base_output, self._factors.packed, bias))
        gain, opposite = self._constant
        return self._add(z, scaled_base(base_output, gain, None if bias is None else opposite * bias))
