"""Drawings of the concepts in five styles: rendering them from their packages, and reading the archive again.

`build_pictures` renders every concept in every style once: cropped to what is visible, centred on a square with the
same small margin for all, and stored losslessly. An archive is a directory with, for each style, `<style>.zip` (one
WebP with alpha for each concept, named by its Unicode sequence) and `<style>.json` (what it is, whence, and what it
allows). The bytes do not depend on the machine's clock or order of work.

The packages (see tools/fetch_pictures.sh) and what they allow are in STYLES.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, features
from tqdm import tqdm

from mmdlm.data.concepts import Concept, load_concepts, unlike_cldr
from mmdlm.errors import InputError

MARGIN = 1 / 32  # of the picture's side, left free on each side of the drawing
_RENDER_SIDE = 256  # drawings are rendered at this size and made smaller: the crop is then exact to half a pixel
_NOTO_SIZE = 109  # the only size of the font's bitmaps
_FORMAT = 1


@dataclass(frozen=True)
class Style:
    """One set of drawings: where it comes from and what it allows."""

    name: str
    phrase: str  # how captions call it: "in the twemoji style"
    package: str
    licence: str


STYLES = {
    style.name: style
    for style in (
        Style("noto", "noto", "Debian fonts-noto-color-emoji 2.042", "OFL-1.1 (font), Apache-2.0 (images)"),
        Style("twemoji", "twemoji", "npm @twemoji/svg 15.0.0", "CC-BY-4.0, Copyright Twitter, Inc and contributors"),
        Style("fluent_flat", "fluent flat", "npm fluentui-emoji 1.3.0", "MIT, Copyright Microsoft Corporation"),
        Style("fluent_modern", "fluent modern", "npm fluentui-emoji 1.3.0", "MIT, Copyright Microsoft Corporation"),
        Style("openmoji", "openmoji", "npm openmoji 17.0.0", "CC-BY-SA-4.0, the OpenMoji project"),
    )
}
HELD_OUT_STYLE = "openmoji"  # never trained on
TRAINING_STYLES = tuple(name for name in STYLES if name != HELD_OUT_STYLE)


def build_pictures(
    out: str | Path,
    *,
    source: str | Path | None = None,
    size: int = 128,
    styles: Sequence[str] = tuple(STYLES),
    jobs: int | None = None,
) -> dict[str, int]:
    """Render all concepts in `styles` into the archive `out`; returns the number of drawings of each style.

    Args:
        out: directory of the archive. A style that is already there in full is kept, so an interrupted run resumes.
        source: directory of the unpacked packages, as tools/fetch_pictures.sh leaves it; `out`/packages by default.
        size: side of the stored pictures in pixels.
        styles: which drawings, all by default; each needs only its own package.
        jobs: processes; all cores by default.

    Raises:
        InputError: an unknown style or a size out of range, a package is missing, this Pillow can not draw the font or
            write WebP, or `out` can not be written.
    """
    out = Path(out)
    source = Path(source) if source is not None else out / "packages"
    if not 16 <= size <= _RENDER_SIDE:
        raise InputError(f"The size of a drawing is {size} pixels: give one from 16 to {_RENDER_SIDE}.")
    for name in styles:
        _require_style(name)
    finished = {name: _finished(out, name, size) for name in styles}
    for name, have in finished.items():
        if have is None:  # a finished archive travels without the packages
            _require_package(source, name)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"The archive {out} can not be made ({error.strerror}): name a directory that can.") from error
    counts = {}
    for name, have in finished.items():
        style = STYLES[name]
        counts[name] = _build_style(out, source, name, size, jobs) if have is None else have
        tqdm.write(f"{name:14} {counts[name]:5} drawings   {style.package}   {style.licence}")
    if (names := source / "emojibase-data").is_dir():
        unlike = unlike_cldr(names)
        like = f"{len(load_concepts()) - len(unlike):5} concepts  in the groups of npm emojibase-data   MIT"
        tqdm.write(f"{'names':14} {like}" + (f"; not {', '.join(unlike[:5])}" if unlike else ""))
    whole = sum((out / f"{name}.zip").stat().st_size for name in finished) / 1e6
    what = f"{sum(counts.values()):5} drawings of {len(load_concepts())} concepts"
    tqdm.write(f"{'together':14} {what} in {out}, {whole:.1f} MB")
    return counts


class Drawings:
    """The archive, read: RGBA pictures by (style, sequence).

    Raises:
        InputError: the directory is no archive, or lacks one of `styles`, or is damaged.
    """

    def __init__(self, directory: str | Path, styles: Sequence[str]) -> None:
        self.directory = Path(directory)
        self.size = 0
        self._bytes: dict[tuple[str, str], bytes] = {}
        for style in styles:
            _require_style(style)
            self._read(style)

    def _read(self, style: str) -> None:
        about, pictures = self.directory / f"{style}.json", self.directory / f"{style}.zip"
        if not about.is_file() or not pictures.is_file():
            raise InputError(
                f"{self.directory} holds no drawings in the style {style}: build them with "
                f"`mmdlm data build pictures {self.directory}`."
            )
        try:
            facts = json.loads(about.read_text(encoding="utf-8"))
            with zipfile.ZipFile(pictures) as archive:
                found = {name.removesuffix(".webp"): archive.read(name) for name in archive.namelist()}
            size, count, version = int(facts["size"]), int(facts["drawings"]), facts["format"]
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise InputError(
                f"The drawings in {pictures} can not be read ({error}): delete that file and build it again."
            ) from error
        if version != _FORMAT or count != len(found) or self.size not in (0, size):
            raise InputError(
                f"{pictures} has {len(found)} drawings of {size} pixels in format {version}, where {count} of "
                f"{self.size or size} in format {_FORMAT} were expected: delete that file and build it again."
            )
        self.size = size
        self._bytes.update({(style, sequence): content for sequence, content in found.items()})

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self._bytes

    def picture(self, style: str, sequence: str) -> Image.Image:
        """The RGBA picture of a concept in a style, `size` x `size`."""
        try:
            return Image.open(io.BytesIO(self._bytes[style, sequence])).convert("RGBA")
        except (OSError, ValueError) as error:
            raise InputError(
                f"The drawing {sequence} in {self.directory / style}.zip is no picture: delete that file and build it "
                "again."
            ) from error


def write_archive(directory: Path, style: str, pictures: Mapping[str, bytes], size: int) -> None:
    """Write one style of an archive: `pictures` are WebP files of `size` pixels by Unicode sequence.

    The same pictures give the same bytes. The description is renamed last: only with it is a style there.
    """
    temporary, about = directory / f"{style}.zip.part", directory / f"{style}.json.part"
    facts = {**_about(style, size), "drawings": len(pictures)}
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            for sequence, content in pictures.items():
                # a ZipInfo made by hand has a constant date
                archive.writestr(zipfile.ZipInfo(f"{sequence}.webp"), content)
        about.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        temporary.replace(directory / f"{style}.zip")
        about.replace(directory / f"{style}.json")
    except OSError as error:
        raise InputError(
            f"The drawings in the style {style} can not be written to {directory} ({error.strerror}): make room or "
            "name another directory; the styles before it are there."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
        about.unlink(missing_ok=True)


def webp(picture: Image.Image) -> bytes:
    """The RGBA picture as lossless WebP."""
    content = io.BytesIO()
    picture.save(content, "WEBP", lossless=True, quality=50, method=4)  # more effort: 30 times as slow for 2 %
    return content.getvalue()


def tight(picture: Image.Image, size: int) -> Image.Image:
    """`picture` (RGBA) cropped to what is visible, centred on a square of `size` pixels with the common margin.

    Raises:
        ValueError: nothing is visible.
    """
    box = picture.getchannel("A").point(lambda alpha: 255 if alpha > 8 else 0).getbbox()
    if box is None:
        raise ValueError("the drawing is empty: nothing in it is visible")
    inner = size - 2 * round(size * MARGIN)
    width, height = box[2] - box[0], box[3] - box[1]
    scale = inner / max(width, height)
    scaled = (max(1, round(width * scale)), max(1, round(height * scale)))
    # Premultiplied ("RGBa") while it is resampled: the colour of invisible pixels must not bleed into the edge.
    small = picture.convert("RGBa").resize(scaled, Image.Resampling.LANCZOS, box=box).convert("RGBA")
    square = Image.new("RGBA", (size, size))
    # Alphas a hair from nothing or from solid are noise of the resampling that no eye sees, and cost a tenth in bytes.
    small.putalpha(small.getchannel("A").point(lambda alpha: 0 if alpha <= 4 else 255 if alpha >= 250 else alpha))
    square.paste(small, ((size - scaled[0]) // 2, (size - scaled[1]) // 2))
    return square


# ---------------------------------------------------------------------------------------------------- rendering


def render(concept: Concept, style: str, source: Path) -> Image.Image | None:
    """One concept in one style as its package draws it (RGBA, not yet cropped), or None where the style lacks it."""
    return _RENDERERS[style](concept, source)


def _svg(paths: Iterator[Path]) -> Image.Image | None:
    import resvg_py

    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return None
    side = _RENDER_SIDE
    try:
        png = resvg_py.svg_to_bytes(svg_string=path.read_text(encoding="utf-8"), width=side, height=side)
        return Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    except (OSError, ValueError) as error:
        raise InputError(
            f"The drawing {path} can not be rendered ({error}): delete its package and fetch it again."
        ) from error


def _fluent(kind: str, concept: Concept, source: Path) -> Image.Image | None:
    folder = source / "fluentui-emoji" / "icons" / kind
    slug = _FLUENT_NAMES.get(concept.sequence, concept.slug)
    # people have one file for each skin tone; "-default" has none
    names = (slug, f"{slug}-default", f"person-{slug}-default", f"person-{slug}")
    return _svg(folder / f"{name}.svg" for name in names)


def _twemoji(concept: Concept, source: Path) -> Image.Image | None:
    sequence = concept.sequence.lower()
    names = (sequence, sequence.replace("-fe0f", ""))
    return _svg(source / "twemoji-svg" / f"{name}.svg" for name in names)


def _openmoji(concept: Concept, source: Path) -> Image.Image | None:
    names = (concept.sequence, concept.sequence.replace("-FE0F", ""))
    return _svg(source / "openmoji" / "color" / "svg" / f"{name}.svg" for name in names)


def _noto(concept: Concept, source: Path) -> Image.Image | None:
    font = _noto_font(str(_noto_path(source)))
    points = [int(point, 16) for point in concept.sequence.split("-")]
    text = "".join(map(chr, points))
    if len(points) > 1 or points[0] < 0x1F000:
        text += "\ufe0f"  # ask for the coloured form of characters that are also text
    if round(font.getlength(text)) != round(font.getlength("\U0001f600")):
        return None  # not one glyph: the font has no ligature for the sequence
    picture = Image.new("RGBA", (200, 200))
    ImageDraw.Draw(picture).text((20, 30), text, font=font, embedded_color=True)
    return picture if picture.getchannel("A").getbbox() else None


@cache
def _noto_font(path: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, _NOTO_SIZE, layout_engine=ImageFont.Layout.RAQM)


def _noto_path(source: Path) -> Path:
    return source / "noto" / "usr" / "share" / "fonts" / "truetype" / "noto" / "NotoColorEmoji.ttf"


_RENDERERS: dict[str, Callable[[Concept, Path], Image.Image | None]] = {
    "noto": _noto,
    "twemoji": _twemoji,
    "fluent_flat": partial(_fluent, "flat"),
    "fluent_modern": partial(_fluent, "modern"),
    "openmoji": _openmoji,
}
# Names the package keeps from older Unicode versions, or has only for women and men.
_FLUENT_NAMES = {
    "1F53A": "red-triangle",
    "1F621": "pouting-face",
    "1F917": "hugging-face",
    "1F9DC": "woman-merpeople-default",
    "1F959": "stuffedbread",
    "1F426-200D-2B1B": "blackbird",
    "1F471": "person-blonde-hair-default",
}


def _require_style(style: str) -> None:
    if style not in STYLES:
        raise InputError(f"There is no style {style!r}: the styles are {', '.join(STYLES)}.")


def _require_package(source: Path, style: str) -> None:
    where = {
        "noto": _noto_path(source),
        "twemoji": source / "twemoji-svg" / "1f34e.svg",
        "fluent_flat": source / "fluentui-emoji" / "icons" / "flat",
        "fluent_modern": source / "fluentui-emoji" / "icons" / "modern",
        "openmoji": source / "openmoji" / "color" / "svg",
    }[style]
    if not where.exists():
        raise InputError(
            f"The drawings in the style {style} are not there ({where} is missing): "
            f"fetch the packages with `bash tools/fetch_pictures.sh {source}`."
        )
    if style != "noto" and find_spec("resvg_py") is None:
        raise InputError("resvg-py, which renders SVG drawings, is not installed: pip install 'mmdlm[data]'.")
    if style == "noto" and not features.check("raqm"):
        raise InputError("This Pillow can not draw the Noto font (it lacks raqm): install Pillow from PyPI.")
    if not features.check("webp"):
        raise InputError("This Pillow can not write WebP: install Pillow from PyPI.")


# ---------------------------------------------------------------------------------------------------- the archive


def _about(style: str, size: int) -> dict[str, Any]:
    """What an archive of this style says about itself."""
    sequences = " ".join(concept.sequence for concept in load_concepts())
    return {
        "format": _FORMAT,
        "style": style,
        "size": size,
        "package": STYLES[style].package,
        "licence": STYLES[style].licence,
        "concepts": blake2b(sequences.encode(), digest_size=8).hexdigest(),
    }


def _finished(out: Path, style: str, size: int) -> int | None:
    """The number of drawings of a style that is already there as it would be built now, else None."""
    about = out / f"{style}.json"
    if not about.is_file() or not (out / f"{style}.zip").is_file():
        return None
    try:
        found = json.loads(about.read_text(encoding="utf-8"))
        count = int(found.pop("drawings"))
        with zipfile.ZipFile(out / f"{style}.zip") as archive:
            whole = len(archive.namelist()) == count
    except (OSError, ValueError, LookupError, AttributeError, TypeError, zipfile.BadZipFile):
        return None
    return count if whole and found == _about(style, size) else None


def _build_style(out: Path, source: Path, style: str, size: int, jobs: int | None) -> int:
    concepts = load_concepts()
    work = partial(_draw_one, style=style, source=source, size=size)
    with ProcessPoolExecutor(jobs or os.cpu_count()) as pool:
        drawn = list(tqdm(pool.map(work, concepts, chunksize=16), total=len(concepts), desc=style, leave=False))
    pictures = {c.sequence: content for c, content in zip(concepts, drawn, strict=True) if content is not None}
    write_archive(out, style, pictures, size)
    return len(pictures)


def _draw_one(concept: Concept, *, style: str, source: Path, size: int) -> bytes | None:
    picture = render(concept, style, source)
    if picture is None or picture.getchannel("A").getbbox() is None:
        return None
    return webp(tight(picture, size))
