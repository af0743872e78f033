"""Packs a trained pipeline as the shipped model: half precision, sampling presets, a model card.

    mmdlm run train/ship model=RUN/pipeline out=mmdlm/assets/pictures [tokenizer=RUN2/visual_tokenizer]

`tokenizer` is one whose decoder alone was trained on meanwhile (`train_encoder: false`): the predictor's codes stay
what they are. The words of its training that a run keeps beside the model (rehearsal.jsonl) go with it. The directory
is written beside its place and renamed, so a failure leaves the old model; nothing but a model is ever replaced.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from mmdlm.errors import InputError
from mmdlm.model_directory import INDEX
from mmdlm.models.visual_tokenizer import LFQTokenizer, saved_tokenizer
from mmdlm.pipelines import TextToImage
from mmdlm.training.arguments import config_from_arguments, run_program
from mmdlm.training.known_words import FILE, read_words, write_words

LIMIT = 40 * 2**20  # bytes of safetensors that the package may carry


@dataclass
class Config:
    """What to pack, and the presets to pack it with."""

    model: str = ""
    tokenizer: str | None = None  # default: the model's own
    out: str = "mmdlm/assets/pictures"
    card: str | None = None
    draw_steps: int = 16
    guidance_scale: float = 1.5
    temperature: float = 0.3
    choice_temperature: float = 4.0
    describe_steps: int = 24
    ask_steps: int = 12
    caption_length: int = 24
    answer_length: int = 16


def with_its_codes(directory: str, known: LFQTokenizer) -> LFQTokenizer:
    """The tokenizer saved in `directory`; InputError unless its encoder, in half precision, is that of `known`."""
    found = saved_tokenizer(directory)
    ours, theirs = ({n: v.half() for n, v in each.encoder.state_dict().items()} for each in (found, known))
    same = ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())
    if not same or any(found.config[name] != known.config[name] for name in ("quantizer", "bit_order")):
        raise InputError(
            f"The encoder of {directory} is not the model's, expected one with the same codes: train it on from the "
            "model's visual_tokenizer with train_encoder=false."
        )
    return found


def replace(out: Path, place: Path) -> None:
    """Gives the directory `place` the name `out`; what stood there is removed after that, and put back on failure."""
    aside = Path(tempfile.mkdtemp(prefix=".old-", dir=out.parent))
    try:
        if os.path.lexists(out):
            os.replace(out, aside / out.name)
        os.replace(place, out)
    except BaseException:
        if os.path.lexists(aside / out.name) and not os.path.lexists(out):
            os.replace(aside / out.name, out)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def main(arguments: list[str]) -> None:
    config = config_from_arguments(Config, arguments, program=__file__)
    out = Path(os.path.abspath(config.out))
    if out.exists() and not (out / INDEX).is_file() and any(out.iterdir()):
        raise InputError(f"{out} is no model directory, it has no {INDEX}: give a new out, for it would be replaced.")
    if config.card and not Path(config.card).is_file():
        raise InputError(f"card is {config.card}, expected a Markdown file, and there is none: check the path.")
    pipeline = TextToImage.from_pretrained(config.model)
    if config.tokenizer:
        pipeline.register_modules(visual_tokenizer=with_its_codes(config.tokenizer, pipeline.visual_tokenizer))
    pipeline.presets = {
        "draw": {
            "num_inference_steps": config.draw_steps,
            "guidance_scale": config.guidance_scale,
            "policy": {"name": "maskgit", "choice_temperature": config.choice_temperature},
            "draw": {"name": "categorical", "temperature": config.temperature},
        },
        "describe": {
            "num_inference_steps": config.describe_steps,
            "answer_length": config.caption_length,
            "policy": {"name": "top_k"},
            "draw": {"name": "greedy"},
        },
        "ask": {
            "num_inference_steps": config.ask_steps,
            "answer_length": config.answer_length,
            "policy": {"name": "top_k"},
            "draw": {"name": "greedy"},
        },
    }
    pipeline.to(torch.float16)
    out.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=".writing-", dir=out.parent))
    try:
        pipeline.save_pretrained(place)
        size = sum(path.stat().st_size for path in place.rglob("*.safetensors"))
        if size > LIMIT:
            raise InputError(
                f"the weights take {size / 2**20:.1f} MiB, expected at most {LIMIT / 2**20:.0f}: train a smaller model"
            )
        if (Path(config.model) / FILE).is_file():
            write_words(place, read_words(Path(config.model)))
        if config.card:
            shutil.copyfile(config.card, place / "README.md")
        place.chmod(0o755)  # what mkdtemp and safetensors write is for their owner alone
        for path in place.rglob("*.safetensors"):
            path.chmod(0o644)
        replace(out, place)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    print(f"{config.out}: {size / 2**20:.1f} MiB of safetensors")


if __name__ == "__main__":
    run_program(main)
