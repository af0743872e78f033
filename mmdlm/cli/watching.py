"""What several commands offer to watch: the steps as pictures, how sure the model was, and the steps again."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmdlm.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    from mmdlm.sampling.replay import Recording

GifOption = Annotated[Path | None, typer.Option("--gif", help="Also write an animation of the process.")]
FramesOption = Annotated[
    Path | None, typer.Option("--frames", help="Also write the picture after each step into this directory.")
]
ConfidenceOption = Annotated[
    Path | None,
    typer.Option("--confidence", help="Also write a PNG of how sure each token was: black unsure, white sure."),
]
ReplayOption = Annotated[
    Path | None,
    typer.Option("--replay", help="A .safetensors of the steps: played if it is there, written if it is not."),
]
PolicyOption = Annotated[
    str | None,
    typer.Option("--policy", help='What to write in a step, for example "{name: threshold, tau: 0.9}".'),
]

CacheOption = Annotated[
    str | None,
    typer.Option("--cache", help='Keys and values kept between steps, for example dual_cache: faster, not exact.'),
]

# pictures by row and by step: what a callback gathers
Films = list[list["Image.Image"]]


def check_watching(
    pictures: Sequence[Path], animation: Path | None, frames: Path | None, confidence: Path | None, replay: Path | None
) -> None:
    """Raises InputError unless all that is asked for can be written, beside each other and beside the `pictures`."""
    from mmdlm.picture_files import check_directory, check_writable

    for path, suffix in ((animation, ".gif"), (confidence, ".png")):
        if path is not None:
            check_writable(path, suffix)
    if frames is not None:
        check_directory(frames)
    if replay is not None and not replay.exists():
        check_writable(replay, ".safetensors")
    asked = [*(("-o", path) for path in pictures), ("--gif", animation), ("--frames", frames),
             ("--confidence", confidence), ("--replay", replay)]  # fmt: skip
    taken: dict[Path, str] = {}
    for option, path in asked:
        if path is None:
            continue
        # Of the folder only: a link is replaced when its name is written, not what it points to.
        place = path.parent.resolve() / path.name
        if place in taken:
            raise InputError(f"{taken[place]} and {option} both write {path}, expected a place for each: rename one.")
        taken[place] = option
    for place, option in taken.items():
        if frames is not None and place.parent == frames.resolve() and re.fullmatch(r"step-\d+\.png", place.name):
            raise InputError(f"{option} and --frames both write {place}, expected a place for each: rename one.")


def recording(path: Path | None) -> Recording | None:
    """The steps to play, or to record."""
    if path is None:
        return None
    from mmdlm.sampling.replay import Recording

    return Recording(path)


def seed_of(seed: int | None, replay: Recording | None) -> int:
    """The seed asked for, else the recorded one, else a random one."""
    if seed is not None:
        return seed
    if replay is not None and replay.playing and str(replay.facts.get("seed", "")).isdecimal():
        return int(replay.facts["seed"])
    import secrets

    return secrets.randbelow(2**32)


def parsed_rule(text: str | None, what: str, example: str) -> dict[str, Any] | None:
    """`threshold` or `{name: threshold, tau: 0.9}` as a mapping. InputError where it is neither."""
    if text is None:
        return None
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if isinstance(value, str):
        return {"name": value}
    if not isinstance(value, dict):
        raise InputError(f"The {what} {text!r} is not understood, expected for example {example}.")
    return value


def parsed_policy(text: str | None) -> dict[str, Any] | None:
    return parsed_rule(text, "policy", "{name: threshold, tau: 0.9}")


def parsed_cache(text: str | None) -> dict[str, Any] | None:
    return parsed_rule(text, "cache", "{name: dual_cache, refresh_interval: 8}")


def keep_frames(films: Films, first_row: int) -> Any:
    """A callback that puts the picture after each step at the end of its row's film."""

    def keep(pipe: Any, step: int, _: float, tensors: dict[str, Any]) -> None:
        if "codes" not in tensors:  # words are being found
            return
        for row, picture in enumerate(pipe.preview(tensors["codes"], tensors["undecided"])):
            while len(films) <= first_row + row:
                films.append([])
            films[first_row + row].append(picture)

    return keep


def watched_files(
    films: Films, columns: int, animation: Path | None, frames: Path | None, facts: Mapping[str, object]
) -> dict[Path, bytes]:
    """The animation and the frames, a sheet of all rows for each step, as what is to be written.

    Every frame carries `facts`, where the pictures came from, and its step.
    """
    from mmdlm.picture_files import gif, png, sheet

    longest = max((len(film) for film in films), default=0)
    sheets = [sheet([film[min(step, len(film) - 1)] for film in films], columns) for step in range(longest)]
    if not sheets:
        return {}
    files = {} if animation is None else {animation: gif(sheets)}
    if frames is not None:
        digits = len(str(longest - 1))
        for step, shown in enumerate(sheets):
            files[frames / f"step-{step:0{digits}}.png"] = png(shown, {**facts, "step": step})
    return files


def confidence_sheet(confidence: Sequence[Any], columns: int, side: int, facts: Mapping[str, object]) -> bytes:
    """PNG of each row's confidences [h, w], as large as its picture, with `facts`, where the pictures came from."""
    from mmdlm.picture_files import heat_map, png, sheet

    about = {"about": "probability at which each code was drawn: black 0, through red and yellow, white 1"}
    return png(sheet([heat_map(row.tolist(), side) for row in confidence], columns), {**facts, **about})


def square_side(count: int) -> int:
    """The columns of a sheet of `count` pictures that is square or a little wide."""
    import math

    return math.isqrt(count - 1) + 1
