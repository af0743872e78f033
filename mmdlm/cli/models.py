"""`mmdlm convert` and `mmdlm verify`: published models in our format, and the proof that they give their numbers."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmdlm.cli.loading import QuietOption
from mmdlm.errors import InputError

if TYPE_CHECKING:
    from mmdlm.evaluation.parity import Check

# Columns of the report: known before the first check is made, so that every line can be printed at once.
CHECK_WIDTH, FOUND_WIDTH = 34, 20


def convert(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A published model: directory or Hub name.")],
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="The directory to write; must not exist.")],
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; as it is stored if not given.")
    ] = None,
    visual_tokenizer: Annotated[
        str | None, typer.Option("--visual-tokenizer", help="The model's visual tokenizer: directory or Hub name.")
    ] = None,
    ids: Annotated[
        list[str] | None,
        typer.Option("--id", metavar="NAME=NUMBER", help="An id that SOURCE does not say, as image_start=126349."),
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Write a published model once as a model directory of ours. Nothing in SOURCE is run.

    A language model's tokenizer comes with it; with its visual tokenizer the directory is whole and draws. A visual
    tokenizer alone may be SOURCE too.
    """
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise InputError(f"--dtype is {dtype}, expected float32, bfloat16 or float16.")
    vocabulary = dict(_named_id(given) for given in ids or ())
    import torch
    from transformers.utils import logging as transformers_logging

    import mmdlm.convert

    transformers_logging.set_verbosity_error()
    mmdlm.convert.convert(
        source,
        destination,
        dtype=None if dtype is None else getattr(torch, dtype),
        visual_tokenizer=visual_tokenizer,
        vocabulary=vocabulary or None,
        progress=not quiet and sys.stderr.isatty(),
    )
    parts = sorted(path.name for path in destination.iterdir() if path.is_dir())
    typer.echo(f"{destination} ({', '.join(parts) or 'visual tokenizer'})")


def _named_id(given: str) -> tuple[str, int]:
    from mmdlm.vocabulary import Vocabulary

    name, _, number = given.partition("=")
    known = list(Vocabulary.__dataclass_fields__)
    if name not in known or not number.isdecimal():
        raise InputError(f"--id is {given!r}, expected NAME=NUMBER with a name of {', '.join(known)}.")
    return name, int(number)


def verify(
    cases: Annotated[list[Path], typer.Argument(metavar="CASE_DIR...", help="Directories of recorded cases.")],
) -> None:
    """Replay recorded cases of the published models; one line for each check, exit code 1 if any fails.

    A case is a directory with case.json, case.safetensors and, for most kinds, a tiny checkpoint. Files beside the
    cases are passed over, so that a shell's * may be given.
    """
    directories = [case for case in cases if not case.is_file()]
    if not directories:
        raise InputError(f"{cases[0]} is a file, expected the directory of a recorded case.")
    if not sys.stdout.isatty():
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # whoever reads along sees it at once
    from mmdlm.evaluation.parity import Check, read_case
    from mmdlm.evaluation.parity import verify as replay

    for directory in directories:
        read_case(directory)  # a directory that is no case is refused before any work
    width = max(len(directory.name) for directory in directories)
    made = failed = 0
    unreadable = False
    for directory in directories:
        try:
            for check in replay(directory):
                made, failed = made + 1, failed + (not check.passed)
                typer.echo(_line(directory.name, width, check))
        except InputError as error:
            unreadable = True
            typer.echo(f"mmdlm: {' '.join(str(error).split())}", err=True)
        except BrokenPipeError:  # whoever reads has seen enough (verify ... | head)
            raise
        except Exception as error:
            # A bug in one replay must not hide what the other cases say; its traceback stays in sight.
            traceback.print_exc()
            made, failed = made + 1, failed + 1
            typer.echo(_line(directory.name, width, Check("replay", "broke", False, repr(error)[:160])))
    plural = "" if len(directories) == 1 else "s"
    typer.echo(f"{made} checks of {len(directories)} case{plural}, {failed or 'none'} failed")
    if unreadable or failed:
        raise typer.Exit(2 if unreadable else 1)


def _line(case: str, width: int, check: Check) -> str:
    verdict = "PASS" if check.passed else "FAIL"
    columns = f"{case:{width}}  {check.name:{CHECK_WIDTH}}  {check.found:{FOUND_WIDTH}}  {verdict}  {check.note}"
    return columns.rstrip()
