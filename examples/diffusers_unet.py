"""diffusers: a model's own `add_adapter(config)`; a small UNet2DConditionModel learns lying digits.

Attention and convolutions are adapted. No pretrained model is available, so the base is trained here first.
"""

import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import mse_loss, one_hot

import dvora
from dvora.training import parameter_groups
from examples.checks import folder_bytes, frozen_digest, report, require, same_bits, trained_parameters
from materials.data import digits
from materials.splits import Images

BATCH, BASE_STEPS, STEPS, FILE = 32, 250, 120, "adapter_model.safetensors"
SCHEDULE = DDPMScheduler(num_train_timesteps=200)


def network() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=10,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def denoising_loss(unet: UNet2DConditionModel, images: Images, rows: Tensor, seed: int, *, lying: bool) -> Tensor:
    """How far the predicted noise is from the noise of `seed` that was added to the images in these rows."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.from_numpy(images.pixels)[rows].float().div(127.5).sub(1)[:, None]
    clean = clean.rot90(1, (2, 3)) if lying else clean
    noise = torch.randn(clean.shape, generator=generator)
    times = torch.randint(0, len(SCHEDULE.betas), (len(rows),), generator=generator)
    which_digit = one_hot(torch.from_numpy(images.labels)[rows], 10)[:, None].float()
    return mse_loss(unet(SCHEDULE.add_noise(clean, noise, times), times, which_digit).sample, noise)


def train(unet: UNet2DConditionModel, images: Images, groups: list[dict], steps: int, *, lying: bool) -> None:
    optimizer, generator = torch.optim.AdamW(groups), torch.Generator().manual_seed(0)
    unet.train()
    for step in range(steps):
        rows = torch.randint(0, len(images), (BATCH,), generator=generator)
        denoising_loss(unet, images, rows, step, lying=lying).backward()
        optimizer.step()
        optimizer.zero_grad()
    unet.eval()


@torch.no_grad()
def test_loss(unet: UNet2DConditionModel, images: Images) -> Tensor:
    return denoising_loss(unet.eval(), images, torch.arange(len(images)), seed=1, lying=True)


def main(folder: Path) -> None:
    task = digits()
    unet = network()
    train(unet, task.train, [{"params": unet.parameters(), "lr": 2e-3}], BASE_STEPS, lying=False)
    unet.save_pretrained(folder / "base")
    untouched, start = frozen_digest(unet), test_loss(unet, task.test)

    # The lines that matter. Everything but the adapter is frozen first, as diffusers' own scripts do.
    unet.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_in", "conv_out"]
    unet.add_adapter(dvora.DVoRAConfig(r=64, target_modules=targets))
    require(same_bits(test_loss(unet, task.test), start), "an adapter that is not trained changes nothing")
    groups = parameter_groups(unet, 0.02, learning_rates={"magnitude": 0.004})
    train(unet, task.train, groups, STEPS, lying=True)
    end = test_loss(unet, task.test)

    unet.disable_adapters()
    require(same_bits(test_loss(unet, task.test), start), "with its adapters off the model is the base")
    unet.enable_adapters()
    require(frozen_digest(unet) == untouched, "the base keeps every bit")

    # `load_lora_adapter` reads LoRA only, and `save_pretrained` writes the whole model: PEFT saves and loads.
    (folder / "adapter").mkdir()
    save_file(get_peft_model_state_dict(unet), folder / "adapter" / FILE)
    unet.peft_config["default"].save_pretrained(folder / "adapter")
    fresh = UNet2DConditionModel.from_pretrained(folder / "base")
    fresh.add_adapter(dvora.DVoRAConfig.from_pretrained(str(folder / "adapter")))
    set_peft_model_state_dict(fresh, load_file(folder / "adapter" / FILE))
    require(same_bits(test_loss(fresh, task.test), end), "the loaded adapter gives the same loss on a new base")
    require(bool(end < start), f"lying digits are denoised better: {start} to {end}")
    report(
        {
            "works": True,
            "figures": {
                "test_loss": [start.item(), end.item()],
                "trained_values": trained_parameters(unet),
                "adapter_bytes": folder_bytes(folder / "adapter"),
            },
            "versions": {"diffusers": version("diffusers")},
        }
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
