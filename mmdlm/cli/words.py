"""`mmdlm caption` and `mmdlm ask`: words from pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mmdlm.cli.loading import (
    AdapterOption,
    DeviceOption,
    ModelOption,
    QuantizeOption,
    QuietOption,
    StepsOption,
    load_pipeline,
)
from mmdlm.cli.watching import (
    CacheOption,
    PolicyOption,
    ReplayOption,
    check_watching,
    parsed_cache,
    parsed_policy,
    recording,
)
from mmdlm.errors import InputError

PatternOption = Annotated[
    str | None, typer.Option("--pattern", help="A regular expression that the words must match as a whole.")
]
SchemaOption = Annotated[
    Path | None, typer.Option("--schema", help="A file with a JSON schema: the words are JSON of it.")
]
ROWS_AT_ONCE = 8  # pictures described together: more would only cost memory on a laptop


def caption(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Pictures to describe.")],
    steps: StepsOption = None,
    policy: PolicyOption = None,
    cache: CacheOption = None,
    pattern: PatternOption = None,
    schema: SchemaOption = None,
    replay: ReplayOption = None,
    best_of: Annotated[
        int, typer.Option("--best-of", min=1, help="Find so many; keep the one the picture makes likeliest.")
    ] = 1,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**31 - 1, help="Of the candidates of --best-of.")] = 0,
    model: ModelOption = None,
    adapter: AdapterOption = None,
    device: DeviceOption = None,
    quantize: QuantizeOption = None,
    quiet: QuietOption = False,
) -> None:
    """Describe pictures: one line for each."""
    from mmdlm.processing import load_image

    check_watching((), None, None, None, replay)
    if best_of > 1 and (replay or pattern or schema):
        raise InputError("--best-of got more than 1 beside a replay or a format, expected one of them: leave one out.")
    pictures, rule, played = [load_image(image) for image in images], parsed_policy(policy), recording(replay)
    settings = {"num_inference_steps": steps, "policy": rule, "cache": parsed_cache(cache),
                "pattern": _pattern(pattern, schema), "replay": played}
    pipe = load_pipeline("ImageToText", model, device, quiet, quantize, adapter=adapter)
    if played is not None:
        from mmdlm.model_directory import model_hash

        told = {"steps": steps, "policy": policy, "cache": cache, "pattern": settings["pattern"]}
        played.check({"command": "caption", "rows": len(images), "model_hash": model_hash(Path(pipe.name_or_path)),
                      **{name: value for name, value in told.items() if value is not None}})
    for start in range(0, len(pictures), ROWS_AT_ONCE):
        part = pictures[start : start + ROWS_AT_ONCE]
        found = pipe(part, **settings)
        texts = found.texts
        if best_of > 1:
            texts = [_best_text(pipe, picture, ids, best_of, seed, steps, rule)
                     for picture, ids in zip(part, found.ids, strict=True)]
        for image, text in zip(images[start:], texts, strict=False):
            typer.echo(_one_line(text) if len(images) == 1 else f"{image}\t{_one_line(text)}")
    if played is not None and not played.playing:
        from mmdlm.picture_files import write_whole

        write_whole(played.path, played.content())


def ask(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The picture.")],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="The question, quoted.")],
    steps: StepsOption = None,
    pattern: PatternOption = None,
    schema: SchemaOption = None,
    model: ModelOption = None,
    adapter: AdapterOption = None,
    device: DeviceOption = None,
    quantize: QuantizeOption = None,
    quiet: QuietOption = False,
) -> None:
    """Answer a question about a picture."""
    from mmdlm.processing import load_image

    picture = load_image(image)
    pipe = load_pipeline("ImageToText", model, device, quiet, quantize, adapter=adapter)
    found = pipe(picture, question, num_inference_steps=steps, pattern=_pattern(pattern, schema))
    typer.echo(_one_line(found.texts[0]))


def _pattern(pattern: str | None, schema: Path | None) -> str | None:
    """The regular expression asked for, or that of the JSON schema in a file."""
    if schema is None:
        return pattern
    if pattern is not None:
        raise InputError("Got --pattern and --schema, expected one of them: leave one out.")
    from mmdlm.sampling.formats import pattern_of_schema

    try:
        return pattern_of_schema(schema.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{schema} is no file with a JSON schema ({error}): check the path.") from error


def _best_text(
    pipe: Any, picture: Any, greedy: Any, best_of: int, seed: int, steps: int | None, policy: dict[str, Any] | None
) -> str:
    """The likeliest of the picture, by the bound, of the greedy caption (its ids [W]) and best_of - 1 drawn ones."""
    import torch

    from mmdlm.cli.score import SAMPLES
    from mmdlm.evaluation.scoring import words_given_picture

    generators = [torch.Generator().manual_seed(seed + number) for number in range(best_of - 1)]
    drawn = pipe([picture] * len(generators), num_inference_steps=steps, policy=policy, generator=generators,
                 draw={"name": "categorical"})
    eos, room = pipe.processor.vocabulary.eos_id, len(greedy)
    whole = [[*row, eos] for row in [greedy.tolist(), *drawn.ids.tolist()]]
    said = [list(row) for row in dict.fromkeys(tuple(row[: row.index(eos)]) for row in whole)]
    # one that does not end within its room has no bound beside the others
    said = [row for row in said if 0 < len(row) < room]
    if not said:
        return str(pipe.processor.text(greedy))
    pixels = pipe.processor.pixels(picture).to(pipe.model.device, pipe.visual_tokenizer.dtype)
    codes = pipe.visual_tokenizer.encode(pixels).cpu().expand(len(said), -1, -1)
    best = int(words_given_picture(pipe, said, codes, samples=SAMPLES, seed=0).nats.argmin())
    return str(pipe.processor.text(said[best]))


def _one_line(text: str) -> str:
    """A model of bytes can write any byte: line ends become spaces, and nothing steers the terminal."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in " ".join(text.split()))
