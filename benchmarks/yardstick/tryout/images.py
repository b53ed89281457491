"""A stand-in for the images of a cat: twenty small drawings of a disc, in a data set of the same column."""

from pathlib import Path

from PIL import Image, ImageDraw

COUNT = 20
"""As many as PEFT's training parameters have prompts."""
SIZE = 48


def write_images(folder: Path) -> None:
    """Write the images where `load_dataset` looks before it asks the hub: in the folder that a script runs in.

    Args:
        folder: the task's.
    """
    target = folder / "peft-internal-testing" / "cat-image-dataset" / "train"
    target.mkdir(parents=True)
    for number in range(COUNT):
        image = Image.new("RGB", (SIZE, SIZE), (8 * number, 90, 200 - 8 * number))
        place = 4 + number
        ImageDraw.Draw(image).ellipse((place, place, place + 20, place + 20), fill=(230, 150, 40))
        image.save(target / f"{number:02}.png")
