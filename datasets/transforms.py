"""Picture file to a square uint8 tensor, the only path for training and for the reference statistics of FID; uint8 to the model's range, and back."""

import math
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


def open_rgb(path: str | BinaryIO) -> Image.Image:
    """An RGB picture: turned upright by its EXIF tag, transparency laid on white."""
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I"):  # 16 bits, which convert() would clip to white
            image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
        if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def shrink(image: Image.Image, short: int) -> Image.Image:
    """Halve by box filter while the short side is at least twice `short`, then bring it to that by bicubic."""
    while min(image.size) >= 2 * short:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = short / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop (arXiv:2105.05233), which the published FID statistics were made with: the middle of the shrunk picture."""
    image = shrink(image, size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def random_crop(image: Image.Image, size: int, draws: Sequence[float]) -> Image.Image:
    """ADM's random crop: the short side comes to between `size` and size / 0.8, and a square is cut anywhere.  draws: three numbers in [0, 1)."""
    scale, left, top = draws
    image = shrink(image, size + int(scale * (math.ceil(size / 0.8) - size + 1)))
    left, top = int(left * (image.width - size + 1)), int(top * (image.height - size + 1))
    return image.crop((left, top, left + size, top + size))


def to_uint8(image: Image.Image) -> Tensor:
    """RGB picture to (3, H, W) uint8, laid out in memory as the picture is: bringing its colours apart takes a GPU no time, and a core a quarter of a millisecond."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_model_range(pictures: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1]."""
    return pictures.float() / 127.5 - 1


def to_levels(pictures: Tensor) -> Tensor:
    """[-1, 1] to uint8 on the CPU, as a PNG holds it."""
    return ((pictures + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def to_image(picture: Tensor) -> Image.Image:
    """(3, H, W) uint8 to an RGB picture."""
    return Image.fromarray(picture.permute(1, 2, 0).numpy())
