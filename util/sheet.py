"""A sheet of pictures with their captions under them, Japanese ones included."""

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SYSTEM_FONTS = (
    "/usr/share/fonts/opentype/noto/NotoSansCJK-Regular.ttc",
    "/usr/share/fonts/opentype/ipaexfont-gothic/ipaexg.ttf",
    "/usr/share/fonts/truetype/fonts-japanese-gothic.ttf",
    "/System/Library/Fonts/ヒラギノ角ゴシック W3.ttc",
)
CELL = 128  # pixels that a small picture is enlarged to, about


def japanese_font() -> str | None:
    """A font file with Japanese glyphs: $JIT_FONT, that of the package matplotlib-fontja, or one of the system's."""
    package = importlib.util.find_spec("matplotlib_fontja")
    carried = [str(Path(place) / "fonts" / "ipaexg.ttf") for place in (package.submodule_search_locations or [])] if package else []
    return next((path for path in (os.environ.get("JIT_FONT", ""), *carried, *SYSTEM_FONTS) if os.path.isfile(path)), None)


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Break `text` wherever a line of `width` pixels is full; what does not fit into two lines ends in '…'."""
    rows = [""]
    for character in text:
        if font.getlength(rows[-1] + character) > width:
            if len(rows) == 2:
                rows[-1] = rows[-1][:-1] + "…"
                break
            rows.append("")
        rows[-1] += character
    return "\n".join(rows)


def captioned_sheet(pictures: Sequence[Image.Image], captions: Sequence[str], columns: int = 8) -> tuple[Image.Image, bool]:
    """Pictures in rows, each caption below its picture; small pictures are enlarged to about CELL pixels.

    Returns: the sheet, and whether the captions are on it (False where no font was found).
    """
    scale = max(1, CELL // pictures[0].width)
    width, height = pictures[0].width * scale, pictures[0].height * scale
    path, margin = japanese_font(), 6
    font = ImageFont.truetype(path, 14) if path else None
    text_height = 40 if font else 0
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + margin) + margin, rows * (height + text_height + margin) + margin), (236, 236, 236))
    draw = ImageDraw.Draw(sheet)
    for i, (picture, caption) in enumerate(zip(pictures, captions)):
        left, top = margin + i % columns * (width + margin), margin + i // columns * (height + text_height + margin)
        sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, top))
        if font:
            draw.text((left, top + height + 2), wrap(caption, font, width), font=font, fill="black")
    return sheet, font is not None


def save_sheet(path: Path, pictures: Sequence[Image.Image], captions: Sequence[str], columns: int = 8) -> None:
    """Write the sheet; without a font the captions go into a text file beside it."""
    sheet, captioned = captioned_sheet(pictures, captions, columns)
    sheet.save(path)
    if not captioned:
        path.with_suffix(".txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
