"""`mmdlm data`: the material to train on, built, looked through, and turned into codes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from mmdlm.cli.loading import DeviceOption, ModelOption
from mmdlm.errors import InputError

data = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The material to train on.")
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


@data.command()
def validate(
    source: Annotated[str, typer.Argument(metavar="DIR", help="Folder, .parquet, .tar, or a name on the Hub.")],
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 where there is anything to report.")] = False,
    fix: Annotated[Path | None, typer.Option("--fix", metavar="OUT", help="Write a copy of the good rows.")] = None,
    held_out: Annotated[
        str | None, typer.Option("--held-out", metavar="DIR2", help="Data that shall have no picture of DIR.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="The report as JSON too.")] = None,
    model: ModelOption = None,
) -> None:
    """Look through pictures and captions: counts, sizes, duplicates, leaks, and every bad row with its reason."""
    import json

    from tokenizers import Tokenizer

    from mmdlm.assets import shipped_model
    from mmdlm.data.cleaning import write_clean
    from mmdlm.data.validation import validate as validated
    from mmdlm.data.validation import written
    from mmdlm.model_directory import check_tokenizer
    from mmdlm.picture_files import check_writable, write_whole

    if json_file is not None:
        check_writable(json_file, ".json")
    words = (Path(model) if model else shipped_model()) / "processor" / "tokenizer.json"
    if not os.path.isfile(words):  # False where Path would raise: no right to look
        raise InputError(f"{words} is missing, expected the text tokenizer of a model directory: check --model.")
    check_tokenizer(words)
    try:
        tokenizer = Tokenizer.from_file(str(words))
    except Exception as error:  # the tokenizers package raises bare exceptions
        reason = str(error).splitlines()[0]
        raise InputError(f"{words} is no tokenizer that can be read ({reason}): copy or download it again.") from error
    report = validated(
        source, held_out=held_out, count_tokens=lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)
    )
    typer.echo(written(report))
    if json_file is not None:
        write_whole(json_file, (json.dumps(report.to_dict(), indent=1) + "\n").encode())
    if fix is not None:
        own = {name: part for name, part in report.parts.items() if part.name == source}
        count = write_clean(own, fix, beside=(source, *([held_out] if held_out else [])))
        typer.echo(f"{count} rows written to {fix}")
    if strict and not report.clean:
        raise typer.Exit(1)


@data.command()
def tokenize(
    source: Annotated[str, typer.Argument(metavar="IN", help="Folder, .parquet, .tar, or a name on the Hub.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Directory of shards; goes on where it stopped.")],
    model: ModelOption = None,
    split: Annotated[str, typer.Option("--split", help="Which split of IN.")] = "train",
    ray: Annotated[bool, typer.Option("--ray", help="By Ray Data workers, on RAY_ADDRESS or here.")] = False,
    workers: Annotated[int, typer.Option("--workers", min=1, help="How many, with --ray.")] = 2,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Pictures in a shard.")] = 64,
    device: DeviceOption = None,
) -> None:
    """Turn pictures and captions into shards of image codes, to train on without the pictures."""
    from mmdlm.assets import shipped_model
    from mmdlm.data.tokenize import tokenize as tokenized

    found = tokenized(
        source, output, model=model or shipped_model(), split=split, batch_size=batch_size, device=device or "cpu",
        workers=workers if ray else None,
    )  # fmt: skip
    for where, reason in found.problems:
        typer.echo(f"{where}: {reason}", err=True)
    typer.echo(f"{found.rows} rows written to {output}, {found.before} were there, {len(found.problems)} left out")
