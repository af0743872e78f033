"""Sheets of pictures with words under each: what was asked or said, and in red what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

RIGHT, WRONG, BESIDE = "#202020", "#d01818", "#808080"
_FRAME, _GAP, _FONT = 3, 6, 10


class Exhibit(NamedTuple):
    """A picture on a sheet: lines of (text, colour) under it, and whether it gets a red frame."""

    picture: Image.Image
    lines: Sequence[tuple[str, str]]
    wrong: bool = False


def labelled_sheet(exhibits: Sequence[Exhibit], *, columns: int = 8, side: int = 128) -> Image.Image:
    """The exhibits row after row, each `side` pixels wide, its words wrapped to that width; whole words, no cut.

    Raises ValueError for no exhibits.
    """
    if not exhibits:
        raise ValueError("there is nothing to put on the sheet, expected at least one exhibit")
    font = ImageFont.load_default(size=_FONT)
    height = _FONT + 3
    wrapped = [
        [(line, colour) for text, colour in exhibit.lines for line in _wrapped(text, font, side)]
        for exhibit in exhibits
    ]
    wide = side + 2 * _FRAME
    tall = wide + height * max(len(lines) for lines in wrapped)
    columns = min(columns, len(exhibits))
    rows = -(-len(exhibits) // columns)
    sheet = Image.new("RGB", (columns * (wide + _GAP) + _GAP, rows * (tall + _GAP) + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (exhibit, lines) in enumerate(zip(exhibits, wrapped, strict=True)):
        left, top = _GAP + index % columns * (wide + _GAP), _GAP + index // columns * (tall + _GAP)
        # The frame of a white picture would not be seen without a line.
        draw.rectangle((left, top, left + wide - 1, top + wide - 1), fill=WRONG if exhibit.wrong else "#e0e0e0")
        shown = exhibit.picture.convert("RGB").resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(shown, (left + _FRAME, top + _FRAME))
        for number, (line, colour) in enumerate(lines):
            draw.text((left + _FRAME, top + wide + number * height), line, font=font, fill=colour)
    return sheet


def _wrapped(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines or ["(nothing)"]
