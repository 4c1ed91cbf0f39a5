"""Captioned pictures for the demos, written as an ordinary images/ + captions/ folder: `python -m datasets.demo digits --out DIR`.

digits: scikit-learn's 1,797 real handwritten digits, each in every colour but one, with Japanese captions in several wordings.
A tenth of the (colour, digit) pairs is held out, so that drawing one of those shows that colour and digit are understood apart.
emoji: the colour bitmaps of the Noto Color Emoji font with their Japanese names from the package `emoji`.
"""

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {  # name -> ink on white; hues at least 25 degrees apart, so that the judge can tell them
    "赤": (225, 30, 40),
    "橙": (245, 130, 10),
    "黄": (225, 200, 0),
    "緑": (25, 150, 50),
    "水": (0, 180, 215),
    "青": (30, 60, 215),
    "紫": (130, 40, 190),
    "桃": (245, 85, 165),
}
COLOUR_WORDS = {"水": ("水色の", "水色"), "桃": ("ピンクの", "桃色"), "紫": ("紫の", "紫色"), "橙": ("オレンジの", "橙色"), "緑": ("緑の", "緑色")}
DIGITS = "零一二三四五六七八九"
HELD_OUT = tuple((colour, 3 * i % 10) for i, colour in enumerate(COLOURS))  # 8 of 80 pairs: each colour once, eight digits


def digit_captions(colour: str, digit: int) -> list[str]:
    """All wordings for one pair: '赤い三', '赤色の数字の三', ..."""
    adjective, noun = COLOUR_WORDS.get(colour, (f"{colour}い" if colour != "黄" else "黄色い", f"{colour}色"))
    kanji = DIGITS[digit]
    return [
        f"{adjective}{kanji}",
        f"{noun}の{kanji}",
        f"{noun}の数字の{kanji}",
        f"{adjective}数字の{kanji}",
        f"{noun}で書いた{kanji}",
        f"手書きの{adjective}{digit}",
    ]


def load_ink(size: int) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits as ink coverage.  Returns: (1797, size, size) floats in [0, 1], (1797,) digits."""
    from sklearn.datasets import load_digits

    digits = load_digits()

    def enlarge(ink: np.ndarray) -> np.ndarray:
        framed = Image.fromarray(np.pad(ink / 16, 1).astype(np.float32))  # 8 x 8 and a margin of one
        smooth = np.asarray(framed.resize((size, size), Image.Resampling.BICUBIC))
        return np.clip((smooth - 0.2) / 0.45, 0, 1)  # 17 grey levels, blurred by the enlargement, to a pen's edge

    return np.stack([enlarge(ink) for ink in digits.images]), digits.target


def colour_ink(ink: np.ndarray, colour: str) -> Image.Image:
    """(H, W) coverage to an RGB picture: the colour on white."""
    rgb = 255 + ink[..., None] * (np.array(COLOURS[colour]) - 255.0)
    return Image.fromarray(rgb.round().astype(np.uint8))


def write_pair(root: Path, stem: str, image: Image.Image, captions: list[str]) -> None:
    image.save(root / "images" / f"{stem}.png")
    (root / "captions" / f"{stem}.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")


def make_folders(root: Path) -> None:
    for name in ("images", "captions"):
        (root / name).mkdir(parents=True, exist_ok=True)


def write_digits(root: Path, size: int) -> int:
    """Every digit in every colour, held-out pairs left out.  Returns: the number of pictures."""
    make_folders(root)
    inks, digits = load_ink(size)
    items = [(i, colour) for i in range(len(inks)) for colour in COLOURS if (colour, digits[i]) not in HELD_OUT]
    for i, colour in items:
        write_pair(root, f"{i:04d}-{list(COLOURS).index(colour)}", colour_ink(inks[i], colour), digit_captions(colour, digits[i]))
    return len(items)
