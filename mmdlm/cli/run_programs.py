"""`mmdlm run`, `mmdlm ls`, `mmdlm path`: the programs beside the library."""

from __future__ import annotations

import subprocess
import sys
from typing import Annotated

import typer

from mmdlm.errors import InputError


def run(
    ctx: typer.Context,
    program: Annotated[str, typer.Argument(metavar="PROGRAM", help="For example train/supervised, see `mmdlm ls`.")],
) -> None:
    """Run a program of tokenizers/, train/ or eval/ with the arguments that follow its name."""
    from mmdlm.programs import program_path

    path = program_path(program)
    interpreter = {".py": [sys.executable], ".sh": ["bash"]}.get(path.suffix)
    if interpreter is None:
        raise InputError(f"{path} is no program, expected a .py or .sh file: `mmdlm ls` lists what can be run.")
    raise typer.Exit(subprocess.run([*interpreter, str(path), *ctx.args], check=False).returncode)


def ls() -> None:
    """List the programs, their settings (YAML), and the shipped model."""
    from mmdlm.assets import shipped_model
    from mmdlm.programs import list_programs, program_path

    programs = list_programs()
    typer.echo("programs (mmdlm run PROGRAM ...)")
    for program in programs:
        typer.echo(f"  {program}")
    typer.echo("settings (mmdlm path NAME)")
    for folder in sorted({program_path(program).parent for program in programs}):
        for settings in sorted(folder.rglob("*.yaml")):
            typer.echo(f"  {settings.relative_to(folder.parent).as_posix()}")
    typer.echo("shipped model")
    try:
        typer.echo(f"  {shipped_model()}")
    except InputError:
        typer.echo("  none in this installation")


def path(
    program: Annotated[str, typer.Argument(metavar="PROGRAM", help="For example train/supervised.")],
) -> None:
    """Print where a program lies: accelerate launch "$(mmdlm path train/supervised)" ..."""
    from mmdlm.programs import program_path

    typer.echo(program_path(program))
