"""Captioned pictures for the demos, written as an ordinary images/ + captions/ folder: `python -m datasets.demo digits --out DIR`.

digits: scikit-learn's 1,797 real handwritten digits, each in every colour, with Japanese captions in several wordings.
A tenth of the (colour, digit) pairs is held out, so that drawing one of those shows that colour and digit are understood apart.
emoji: the colour bitmaps of the Noto Color Emoji font with their Japanese names from the package `emoji`.
"""

import argparse
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from util.errors import UserError

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
ADJECTIVES = {"赤": "赤い", "橙": "オレンジの", "黄": "黄色い", "緑": "緑の", "水": "水色の", "青": "青い", "紫": "紫の", "桃": "ピンクの"}
DIGITS = "零一二三四五六七八九"
HELD_OUT = tuple((colour, 3 * i % 10) for i, colour in enumerate(COLOURS))  # 8 of 80 pairs: each colour once, eight digits


def digit_captions(colour: str, digit: int) -> list[str]:
    """All wordings for one pair: '赤い三', '赤色の数字の三', ..."""
    adjective, noun, kanji = ADJECTIVES[colour], f"{colour}色", DIGITS[digit]
    return [
        f"{adjective}{kanji}",
        f"{noun}の{kanji}",
        f"{noun}の数字の{kanji}",
        f"{adjective}数字の{kanji}",
        f"{noun}で書いた{kanji}",
        f"手書きの{adjective}{digit}",
    ]


def digit_prompts(pairs: Sequence[tuple[str, int]]) -> list[str]:
    """A caption of each pair; the wording changes after every round of the held-out ones."""
    return [digit_captions(*pair)[i // len(HELD_OUT) % 6] for i, pair in enumerate(pairs)]


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


EMOJI_SUBSET = (  # 64 for a CPU: everyday things of many shapes and colours
    "🐱🐶🐭🐰🦊🐻🐼🐨🐯🦁🐮🐷🐸🐵🐔🐧🐙🐠🐳🐢🦋🐝🐞🐌🍎🍊🍋🍌🍉🍇🍓🍑🍅🍆🥕🌽🍄🍞🍕🍔🍙🍣🍦🍩🎂🍺🌸🌻🌵🌲🗻🌈🌙⚽🏀🎈🎁🚗🚌🚲🚀🏠❤⏰"
)
EMOJI_FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
SKIN_TONES = {chr(code) for code in range(0x1F3FB, 0x1F400)}
FLAG_LETTERS = {chr(code) for code in range(0x1F1E6, 0x1F200)} | {"🏴"}


def emoji_names() -> dict[str, str]:
    """Fully qualified emoji without flags and skin tones -> Japanese name ('🐈\u200d⬛' -> '黒猫')."""
    import emoji

    emoji.config.load_language("ja")
    qualified = [text for text, data in emoji.EMOJI_DATA.items() if data["status"] == emoji.STATUS["fully_qualified"] and "ja" in data]
    plain = [text for text in qualified if not (set(text) & SKIN_TONES or text[0] in FLAG_LETTERS)]
    return {text: emoji.EMOJI_DATA[text]["ja"].strip(":").replace("_", "") for text in plain}


def emoji_bitmaps(path: str) -> tuple[dict[tuple[str, ...], bytes], dict[int, str]]:
    """A CBDT colour font's PNG files by the glyph names that its ligatures put together, and its glyph name of each character."""
    from fontTools.ttLib import TTFont

    font = TTFont(path)
    bitmaps = {name: glyph.imageData for name, glyph in font["CBDT"].strikeData[0].items()}
    found = {(name,): data for name, data in bitmaps.items()}
    for lookup in font["GSUB"].table.LookupList.Lookup:
        for table in lookup.SubTable:
            table = getattr(table, "ExtSubTable", table)
            for first, ligatures in getattr(table, "ligatures", {}).items():
                found |= {(first, *ligature.Component): bitmaps[ligature.LigGlyph] for ligature in ligatures if ligature.LigGlyph in bitmaps}
    return found, font.getBestCmap()


def write_emoji(root: Path, size: int, subset: bool) -> int:
    """Emoji on white with their Japanese names.  Returns: the number of pictures.

    Raises: UserError where the font is not installed.
    """
    path = os.environ.get("JIT_EMOJI_FONT", EMOJI_FONT)
    if not os.path.isfile(path):
        raise UserError(f"no emoji font at {path}; install it: apt-get install fonts-noto-color-emoji (or set JIT_EMOJI_FONT to the file)")
    make_folders(root)
    bitmaps, glyph_of = emoji_bitmaps(path)
    count = 0
    for text, name in emoji_names().items():
        bare = text.replace("\ufe0f", "")
        data = bitmaps.get(tuple(glyph_of.get(ord(character), "") for character in bare))
        if data is None or (subset and bare not in EMOJI_SUBSET):
            continue
        write_pair(root, "-".join(f"{ord(character):x}" for character in bare), emoji_picture(data, size), [name])
        count += 1
    return count


def emoji_picture(png: bytes, size: int) -> Image.Image:
    """A 136 x 128 bitmap with transparency to a square on white."""
    glyph = Image.open(io.BytesIO(png)).convert("RGBA")
    canvas = Image.new("RGBA", (max(glyph.size), max(glyph.size)), "white")
    canvas.alpha_composite(glyph, ((canvas.width - glyph.width) // 2, (canvas.height - glyph.height) // 2))
    return canvas.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("digits", "emoji", "emoji64"), help="emoji64: a fixed subset of 64")
    parser.add_argument("--out", type=Path, required=True, help="folder for images/ and captions/")
    parser.add_argument("--size", type=int, default=32, help="width and height in pixels")
    args = parser.parse_args()
    try:
        count = write_digits(args.out, args.size) if args.what == "digits" else write_emoji(args.out, args.size, args.what == "emoji64")
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"{count} captioned pictures in {args.out}")


if __name__ == "__main__":
    main()
