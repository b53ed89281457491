"""Draws the pictures of the page "How it works" with the library's own functions: python -m transcript.pictures"""

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from benchmarks.pictures import FAINT, METHODS, WIDTH, ink, save
from dvora import functional as F

TURNED, MOVED = METHODS["VeRA"], METHODS["DVoRA"]
"""The direction is adapted as VeRA adapts a weight."""


def row() -> Figure:
    """One row of a weight with two inputs: turned by the update, then rescaled to its magnitude."""
    W = torch.tensor([[2.0, 0.6]])
    A, B = torch.tensor([[-0.9, 1.2], [0.5, 0.8], [-0.4, -0.2]]), torch.tensor([[0.8, 1.1, -0.6]])
    w = F.row_norm(W)
    vectors = F.Vectors(magnitude=0.85 * w, lambda_b=torch.tensor([0.55]), lambda_d=torch.tensor([0.6, 0.5, 0.9]))
    V = W + w[:, None] * vectors.lambda_b[:, None] * (B * vectors.lambda_d) @ A
    moved = F.merged_weight(W, A, B, vectors)
    figure, axes = plt.subplots(figsize=(WIDTH, 5), layout="constrained")
    for step in range(3):
        shares = torch.zeros(3)
        shares[step] = vectors.lambda_d[step]
        piece = (w * vectors.lambda_b * (B * shares) @ A)[0]
        start = (W + w[:, None] * vectors.lambda_b[:, None] * (B[:, :step] * vectors.lambda_d[:step]) @ A[:step])[0]
        _arrow(axes, start, start + piece, FAINT)
    for norm, style in ((float(w), ":"), (float(vectors.magnitude), "--")):
        angle = np.linspace(-0.1, 1.35, 100)
        axes.plot(norm * np.cos(angle), norm * np.sin(angle), style, color=FAINT, linewidth=1)
    _arrow(axes, torch.zeros(2), W[0], ink(), "W, of norm w", (0.05, -0.16))
    _arrow(axes, torch.zeros(2), V[0], TURNED, "V' = W + update", (0.06, 0.02))
    _arrow(axes, torch.zeros(2), moved[0], MOVED, "W', of norm m", (-0.9, 0.02))
    axes.text(float(W[0, 0]) + 0.15, 1.0, "rows of A, fixed:\nlambda_b, lambda_d say\nhow far along each", color=FAINT)
    axes.set(xlim=(-0.1, 3.3), ylim=(-0.1, 2.3), aspect="equal", xlabel="first input", ylabel="second input")
    return figure


def values() -> Figure:
    """Trained parameters of a layer of 1,000 x 1,000 by rank."""
    ranks = np.array([1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024])
    figure, axes = plt.subplots(figsize=(WIDTH, 3.8), layout="constrained")
    for label, counts, colour in (
        ("full fine-tuning", np.full(len(ranks), 1_000_000), METHODS["full fine-tuning"]),
        ("", 2000 * ranks + 1000, METHODS["DoRA"]),
        ("LoRA, DoRA", 2000 * ranks, METHODS["LoRA"]),
        ("DVoRA", 2000 + ranks, MOVED),
        ("VeRA", 1000 + ranks, TURNED),
    ):
        axes.plot(ranks, counts, color=colour)
        axes.text(ranks[-1] * 1.15, counts[-1], label, color=colour, va="center")
    axes.set(xscale="log", yscale="log", xlabel="rank", ylabel="trained parameters, 1,000 x 1,000 layer")
    axes.set_xticks([1, 8, 64, 256, 1024], ["1", "8", "64", "256", "1,024"])
    axes.set_xlim(right=9000)
    axes.minorticks_off()
    return figure


def groups() -> Figure:
    """lambda_d by groups: the columns of A, each scaled by the lambda_d of its group."""
    A = torch.rand(4, 18, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.2
    lambda_d = torch.tensor([[0.2, 1.0, 0.5, 0.8], [1.0, 0.3, 0.9, 0.2], [0.6, 0.7, 0.2, 1.0]])
    parts = {
        "lambda_d": lambda_d.T,
        "A (4, 18), frozen": A,
        "A', of which D = B A'": F.scaled_columns(A, lambda_d),
    }
    widths = [max(values.shape[1], 5) for values in parts.values()]
    figure, panels = plt.subplots(1, 3, figsize=(WIDTH, 1.5), layout="constrained", width_ratios=widths)
    colours = [METHODS[name] for name in ("DVoRA", "VeRA", "LoRA")]
    for axes, (label, values) in zip(panels, parts.items(), strict=True):
        for (line, column), value in np.ndenumerate(values.numpy()):
            colour = FAINT if "frozen" in label else colours[column * 3 // values.shape[1]]
            axes.add_patch(Rectangle((column, -line), 0.9, 0.9, color=colour, alpha=float(value), linewidth=0))
        axes.set(xlim=(-0.2, values.shape[1] + 0.1), ylim=(-3.2, 1.1), aspect="equal")
        axes.set_title(label, fontsize="medium")
        axes.axis("off")
    return figure


def _arrow(
    axes: Axes, start: torch.Tensor, end: torch.Tensor, colour: str, label: str = "", off: tuple[float, float] = (0, 0)
) -> None:
    line = {"arrowstyle": "-|>", "color": colour, "linewidth": 2 if label else 1.2, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", xy=end.tolist(), xytext=start.tolist(), arrowprops=line)
    if label:
        axes.text(float(end[0]) + off[0], float(end[1]) + off[1], label, color=colour)


def main() -> None:
    """Draw and save the pictures."""
    save("row", row)
    save("values", values)
    save("groups", groups)


if __name__ == "__main__":
    main()
