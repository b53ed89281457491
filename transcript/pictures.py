"""Draws the pictures of the page "How it works" with the library's own functions: python -m transcript.pictures"""

from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dvora import functional as F

FOLDER = Path(__file__).parent.parent / "docs" / "pictures"
ROW, TURNED, MOVED, RANDOM = "0.25", "tab:orange", "tab:blue", "0.75"


def row() -> Figure:
    """One row of a weight with two inputs: turned by the update, then rescaled to its magnitude."""
    W = torch.tensor([[2.0, 0.6]])
    A, B = torch.tensor([[-0.9, 1.2], [0.5, 0.8], [-0.4, -0.2]]), torch.tensor([[0.8, 1.1, -0.6]])
    w = F.row_norm(W)
    vectors = F.Vectors(magnitude=0.85 * w, lambda_b=torch.tensor([0.55]), lambda_d=torch.tensor([0.6, 0.5, 0.9]))
    V = W + w[:, None] * vectors.lambda_b[:, None] * (B * vectors.lambda_d) @ A
    moved = F.merged_weight(W, A, B, vectors)
    figure, axes = plt.subplots(figsize=(5.2, 4), layout="constrained")
    for step in range(3):
        shares = torch.zeros(3)
        shares[step] = vectors.lambda_d[step]
        piece = (w * vectors.lambda_b * (B * shares) @ A)[0]
        start = (W + w[:, None] * vectors.lambda_b[:, None] * (B[:, :step] * vectors.lambda_d[:step]) @ A[:step])[0]
        _arrow(axes, start, start + piece, RANDOM)
    for norm, style in ((float(w), ":"), (float(vectors.magnitude), "--")):
        angle = np.linspace(-0.1, 1.35, 100)
        axes.plot(norm * np.cos(angle), norm * np.sin(angle), style, color="0.6", linewidth=1)
    _arrow(axes, torch.zeros(2), W[0], ROW, "W, of norm w", (0.05, -0.16))
    _arrow(axes, torch.zeros(2), V[0], TURNED, "V' = W + update", (0.06, 0.02))
    _arrow(axes, torch.zeros(2), moved[0], MOVED, "W', of norm m", (-0.9, 0.02))
    axes.text(float(W[0, 0]) + 0.15, 1.0, "rows of A, fixed:\nlambda_b, lambda_d say\nhow far along each", color="0.5")
    axes.set(xlim=(-0.1, 3.6), ylim=(-0.15, 2.6), aspect="equal", xlabel="first input", ylabel="second input")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def values() -> Figure:
    """Trained values of a layer of 1,000 x 1,000 by rank."""
    ranks = np.array([1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024])
    figure, axes = plt.subplots(figsize=(5.2, 3.4), layout="constrained")
    for label, counts, colour in (
        ("full fine-tuning", np.full(len(ranks), 1_000_000), "0.25"),
        ("", 2000 * ranks + 1000, "tab:red"),
        ("LoRA, DoRA", 2000 * ranks, "tab:green"),
        ("DVoRA", 2000 + ranks, MOVED),
        ("VeRA", 1000 + ranks, TURNED),
    ):
        axes.plot(ranks, counts, color=colour)
        axes.text(ranks[-1] * 1.15, counts[-1], label, color=colour, va="center")
    axes.set(xscale="log", yscale="log", xlabel="rank", ylabel="trained values of a 1,000 x 1,000 layer")
    axes.set_xticks([1, 8, 64, 256, 1024], ["1", "8", "64", "256", "1,024"])
    axes.set_xlim(right=9000)
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _arrow(
    axes: Axes, start: torch.Tensor, end: torch.Tensor, colour: str, label: str = "", off: tuple[float, float] = (0, 0)
) -> None:
    line = {"arrowstyle": "-|>", "color": colour, "linewidth": 2 if label else 1.2, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", xy=end.tolist(), xytext=start.tolist(), arrowprops=line)
    if label:
        axes.text(float(end[0]) + off[0], float(end[1]) + off[1], label, color=colour)


def main() -> None:
    """Write both."""
    for name, draw in (("row", row), ("values", values)):
        figure = draw()
        figure.savefig(FOLDER / f"{name}.png", dpi=110)
        plt.close(figure)


if __name__ == "__main__":
    main()
