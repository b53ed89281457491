"""torchvision: MobileNetV3, whose pointwise and depthwise convolutions are adapted.

The squeeze-and-excitation convolutions are adapted too, and the head is trained whole. No pretrained weights are at
hand: the base learns upright digits here first, and its adapter learns digits that lie on their side.
"""

from importlib.metadata import version

import torch
from torch import nn
from torchvision.models import mobilenet_v3_small

import dvora
from examples.checks import report
from examples.lying_digits import adapted_and_checked


def network() -> nn.Module:
    torch.manual_seed(0)
    return mobilenet_v3_small(num_classes=10).eval()


def main() -> None:
    config = dvora.DVoRAConfig(
        r=64,
        target_modules=r"features\.(\d+|\d+\.block\.\d+)\.(0|fc1|fc2)|classifier\.0",
        modules_to_save=["classifier.3"],
    )
    metrics = adapted_and_checked(network, config, base_steps=150, steps=100)
    versions = {"torchvision": version("torchvision").partition("+")[0]}
    report({"works": True, "figures": metrics, "versions": versions})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
