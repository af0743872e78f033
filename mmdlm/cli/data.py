"""`mmdlm data build`: the material to train on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from mmdlm.errors import InputError

data = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Build the material to train on.")
build = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Build a data set.")
data.add_typer(build, name="build")


@build.command()
def pictures(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to fill; resumes where it stopped.")],
    source: Annotated[
        Path | None, typer.Option("--source", help="Directory of the fetched packages, if not the usual one.")
    ] = None,
) -> None:
    """Render the drawings of the picture world; prints counts and licences."""
    from mmdlm.data.drawings import build_pictures

    standing = next(parent for parent in (output, *output.absolute().parents) if os.path.lexists(parent))
    if not os.path.isdir(standing) or not os.access(standing, os.W_OK):
        raise InputError(f"{output} cannot be written, {standing} is no directory you may write to: choose another.")
    build_pictures(output, source=source)
