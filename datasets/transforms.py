"""Picture file to a square uint8 tensor, the only path for training and for the reference statistics of FID; uint8 to the model's range, and back."""

import math
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

ORIENTATION = 0x0112  # of EXIF
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MOST_PIXELS = 1 << 26  # that a picture is enlarged to as a whole: 0.3 GB


def open_picture(path: str | BinaryIO) -> Image.Image:
    """Image.open, but with a fixed message for what is no picture: Pillow's has a memory address in it."""
    try:
        return Image.open(path)
    except UnidentifiedImageError:
        raise UnidentifiedImageError(f"cannot identify image file{f' {path!r}' if isinstance(path, str) else ''}") from None


def upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF says.  Only the orientation is read: the rest may be damaged, and the picture good."""
    image.load()
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:  # damaged from the start, which Pillow tells by nearly anything
        turn = None
    return image if turn is None else image.transpose(turn)


def open_rgb(path: str | BinaryIO) -> Image.Image:
    """An RGB picture: turned upright by its EXIF tag, transparency laid on white."""
    with open_picture(path) as file:
        image = upright(file)
        if image.mode.startswith("I"):  # 16 bits, which convert() would clip to white
            image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
        if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def shrink(image: Image.Image, short: int) -> tuple[Image.Image, tuple[int, int]]:
    """Halve by box filter while the short side is at least twice `short`.  Returns: the halved picture, and the (width, height), short side `short`, to resize it to bicubically."""
    while min(image.size) >= 2 * short:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = short / min(image.size)
    return image, (round(image.width * scale), round(image.height * scale))


def cut(image: Image.Image, whole: tuple[int, int], corner: tuple[int, int], size: int) -> Image.Image:
    """Resize to `whole` (width, height), then crop `size` x `size` at `corner` (left, top).  Above MOST_PIXELS only the square is resized, to save memory."""
    (left, top), (width, height) = corner, whole
    if width * height <= MOST_PIXELS:
        return image.resize(whole, Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    across, down = image.width / width, image.height / height
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left * across, top * down, (left + size) * across, (top + size) * down))


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop (arXiv:2105.05233), which the published FID statistics were made with: the middle of the shrunk picture."""
    image, (width, height) = shrink(image, size)
    return cut(image, (width, height), ((width - size) // 2, (height - size) // 2), size)


def random_crop(image: Image.Image, size: int, draws: Sequence[float]) -> Image.Image:
    """ADM's random crop: the short side comes to between `size` and size / 0.8, and a square is cut anywhere.  draws: three numbers in [0, 1)."""
    scale, left, top = draws
    image, (width, height) = shrink(image, size + int(scale * (math.ceil(size / 0.8) - size + 1)))
    return cut(image, (width, height), (int(left * (width - size + 1)), int(top * (height - size + 1))), size)


def to_uint8(image: Image.Image) -> Tensor:
    """(3, H, W) uint8, channels last in memory: splitting the colour planes costs a CPU core 0.25 ms, and a GPU nothing."""
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
