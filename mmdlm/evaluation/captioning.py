"""Captions against people's: CIDEr-D, BLEU-1 to 4 and ROUGE-L; COCO's and Flickr30k's files in, COCO's results out.

The scores are those of pycocoevalcap's pure-Python scorers (`pip install "mmdlm[eval]"`): CIDEr-D (arXiv:1411.5726),
BLEU (ACL P02-1040) with the closest reference length, ROUGE-L (ACL W04-1013) with beta 1.2. Words are split by
`mmdlm.evaluation.penn_words`, so no Java is needed; METEOR and SPICE are Java programs and run only where one is.
CIDEr-D weighs words by how rare they are in the references at hand: it is comparable over the same pictures only.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmdlm.errors import InputError
from mmdlm.evaluation.penn_words import tokenised
from mmdlm.evaluation.result_files import (
    answers_for,
    field,
    id_field,
    read_json,
    read_text,
    text_field,
    unique,
    write_json,
)
from mmdlm.evaluation.vqa import Scores


class Captioned(NamedTuple):
    """One picture with what people wrote about it."""

    id: Any
    pictures: tuple[str, ...]  # the names its file may have, with or without an ending
    captions: tuple[str, ...]


def read_coco_captions(path: Path) -> list[Captioned]:
    """COCO's annotations file: {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}."""
    content = read_json(path)
    names = unique(((id_field(row, "id", path), row) for row in field(content, "images", path)), path, "image id")
    said: dict[Any, list[str]] = {key: [] for key in names}
    for row in field(content, "annotations", path):
        key = id_field(row, "image_id", path)
        if key not in said:
            raise InputError(f"{path} has a caption of picture {key!r}, which is not among its images: mend the file.")
        said[key].append(text_field(row, "caption", path))
    pictures = {key: (str(row.get("file_name", key)), str(key)) for key, row in names.items()}
    return _all_captioned([Captioned(key, pictures[key], tuple(said[key])) for key in names], path)


def read_flickr30k(path: Path, split: str | None = None) -> list[Captioned]:
    """Flickr30k's captions: its own .token file ("1000.jpg#0<tab>caption"), or the JSON that carries Karpathy's split.

    split: of the JSON, "test" for example; None takes all. Ids are the pictures' file names.
    """
    if path.suffix == ".json":
        rows = [row for row in field(read_json(path), "images", path) if split in (None, row.get("split"))]
        if not rows:
            raise InputError(f"{path} has no pictures of the split {split!r}, expected train, val or test.")
        found = []
        for row in rows:
            name = text_field(row, "filename", path)
            captions = tuple(text_field(one, "raw", path) for one in field(row, "sentences", path))
            found.append(Captioned(name, (name,), captions))
        unique(((one.id, None) for one in found), path, "picture")
        return _all_captioned(found, path)
    if split is not None:
        raise InputError(f"{path} carries no splits, expected Karpathy's dataset_flickr30k.json: give that file.")
    said: dict[str, list[str]] = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        name, tab, caption = line.partition("\t")
        picture, mark, _ = name.rpartition("#")
        if not tab or not mark:
            raise InputError(f"{path} has {line[:60]!r} on line {number}, expected PICTURE.jpg#0, a tab and a caption.")
        said.setdefault(picture, []).append(caption)
    return _all_captioned([Captioned(name, (name,), tuple(captions)) for name, captions in said.items()], path)


def read_captions(path: Path) -> dict[Any, str]:
    """COCO's result file: [{"image_id", "caption"}]. Raises InputError for another form, and for a picture twice."""
    rows = read_json(path)
    if not isinstance(rows, list):
        raise InputError(f"{path} holds a {type(rows).__name__}, expected a list of image_id and caption.")
    said = ((id_field(row, "image_id", path), text_field(row, "caption", path)) for row in rows)
    return unique(said, path, "picture")


def write_captions(path: Path, captions: Mapping[Any, str]) -> None:
    """The file that COCO's evaluation server takes: [{"image_id", "caption"}]."""
    write_json(path, [{"image_id": key, "caption": caption} for key, caption in captions.items()])


def score_captions(
    references: Sequence[Captioned],
    captions: Mapping[Any, str],
    source: Path | str = "the run",
    *,
    with_java: bool = False,
) -> Scores:
    """CIDEr-D, BLEU-1 to 4 and ROUGE-L over all pictures; rows carry each picture's own, `score` is its CIDEr-D.

    Scales are the scorers' own: CIDEr-D from 0 to 10, the others from 0 to 1; papers print all of them times 100.
    with_java adds METEOR, and SPICE where its models lie beside it. Raises InputError for captions that are not
    exactly those of the pictures, without pycocoevalcap, and for with_java without a Java.
    """
    scorers = _scorers(with_java)
    if not references:
        raise InputError("There is no picture to score captions of, expected at least one: check the file.")
    said = answers_for([one.id for one in references], captions, source)
    gold = {number: tokenised(one.captions) for number, one in enumerate(references)}
    if wordless := [references[number].id for number, words in gold.items() if not any(words)]:
        raise InputError(f"The captions of picture {wordless[0]!r} have no words to compare with: mend the references.")
    ours = {number: [words] for number, words in enumerate(tokenised(said))}
    rows: list[dict[str, Any]] = [
        {"id": one.id, "answer": caption} for one, caption in zip(references, said, strict=True)
    ]
    summary: dict[str, Any] = {}
    for names, scorer in scorers:
        silent = {"verbose": 0} if names[0] == "bleu_1" else {}
        with contextlib.redirect_stdout(io.StringIO()):  # the scorers print what they return
            whole, each = scorer.compute_score(gold, ours, **silent)
        for name, total, values in zip(names, np.atleast_1d(whole), each if len(names) > 1 else [each], strict=True):
            summary[name] = float(total)
            for row, value in zip(rows, values, strict=True):
                row[name] = value["All"]["f"] if isinstance(value, dict) else float(value)
    for row in rows:
        row["score"] = row["cider_d"]
    summary |= {"pictures": len(rows), "empty_captions": sum(not words[0] for words in ours.values())}
    return Scores(summary, rows)


def _scorers(with_java: bool) -> list[tuple[tuple[str, ...], Any]]:
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise InputError('Captions are scored by pycocoevalcap: pip install "mmdlm[eval]".') from error
    scorers = [(("cider_d",), Cider()), (tuple(f"bleu_{n}" for n in range(1, 5)), Bleu(4)), (("rouge_l",), Rouge())]
    if not with_java:
        return scorers
    if shutil.which("java") is None:
        raise InputError("METEOR and SPICE are Java programs and there is no java here: install one or leave them out.")
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.spice import spice

    scorers.append((("meteor",), Meteor()))
    # Its first run would fetch half a gigabyte of models: only where someone has put them in place.
    if list((Path(spice.__file__).parent / "lib").glob("stanford-corenlp-*-models.jar")):
        scorers.append((("spice",), spice.Spice()))
    return scorers


def _all_captioned(found: list[Captioned], path: Path) -> list[Captioned]:
    empty = [one.id for one in found if not one.captions]
    if empty or not found:
        which = f"picture {empty[0]!r} has" if empty else "there is"
        raise InputError(f"{path}: {which} no caption to compare with, expected at least one for each picture.")
    return found
