"""`mmdlm`: what a person types. One file for each idea; a new command is a function of its own file, named below.

torch, transformers and diffusers are imported inside the commands that need them, so that `mmdlm --help` answers at
once. A person's mistake (`InputError`) is one sentence on stderr and exit code 2; a bug keeps its traceback.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mmdlm import __version__
from mmdlm.cli.bench import bench
from mmdlm.cli.caption_folder import caption_folder
from mmdlm.cli.data import data
from mmdlm.cli.doctor import doctor
from mmdlm.cli.evaluate import evaluate
from mmdlm.cli.fill import fill
from mmdlm.cli.finetune import finetune, merge
from mmdlm.cli.models import convert, verify
from mmdlm.cli.pictures import generate
from mmdlm.cli.run_programs import ls, path, run
from mmdlm.cli.score import score
from mmdlm.cli.serve import serve
from mmdlm.cli.tune import tune
from mmdlm.cli.words import _one_line as _one_line
from mmdlm.cli.words import ask, caption
from mmdlm.errors import InputError


class _OneSentence(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as error:
            typer.echo(f"mmdlm: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_OneSentence, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False
)
app.command()(generate)
app.command()(caption)
app.command()(ask)
app.command()(caption_folder)
app.command()(fill)
app.command()(score)
app.command()(finetune)
app.command()(merge)
app.command()(convert)
app.command()(verify)
app.command()(doctor)
app.command()(bench)
app.command()(tune)
app.command()(serve)
app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
    add_help_option=False,
)(run)
app.command()(ls)
app.command()(path)
app.add_typer(data, name="data")
app.add_typer(evaluate, name="eval")


def main() -> None:
    """The console script."""
    # Whoever had torch loaded before calls this from a program of their own, which must not be ended here.
    called_from_program = "torch" in sys.modules
    try:
        app()
    except SystemExit as finished:
        # Everything is written. Taking down torch, transformers and diffusers module by module would keep the person
        # waiting for another second (1.2 s of 7.7 s, measured); the system does it at once.
        if "torch" in sys.modules and not called_from_program and isinstance(finished.code, int):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(finished.code)
        raise


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    """Pictures from words and words from pictures, with one small model that ships with this package."""
    if show:
        typer.echo(__version__)
        raise typer.Exit
