"""timm: a ConvNeXt, whose depthwise convolutions and linear layers are adapted.

The head is trained whole. No pretrained weights are available: the base learns upright digits here first, and its
adapter learns digits that lie on their side.
"""

from importlib.metadata import version

import timm
import torch
from torch import nn

import dvora
from examples.checks import report
from examples.lying_digits import adapted_and_checked


def network() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("convnext_atto", pretrained=False, num_classes=10, in_chans=3).eval()


def main() -> None:
    config = dvora.DVoRAConfig(
        r=64, target_modules=r".*\.(conv_dw|fc1|fc2)|stem\.0|.*downsample\.1", modules_to_save=["head.fc"]
    )
    metrics = adapted_and_checked(network, config, base_steps=120, steps=80)
    report({"works": True, "figures": metrics, "versions": {"timm": version("timm")}})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
