"""A trained model made larger: the words of more concepts, codes of more bits; what it knows it still knows.

    mmdlm run train/grow model=MODEL tokenizer=RUN/visual_tokenizer data=PICTURES concepts=300 out=GROWN

The tokenizer is one that `tokenizers/train_lfq init_from=MODEL/visual_tokenizer` grew, so that its codes begin with the
model's (`keep_codes_weight`; how many do is printed). A new text tokenizer is learned on the words of so many concepts;
a token that the old one had keeps its rows, another begins as the mean of its old spelling. `out` is a model directory
to go on from: `train/supervised init_from=GROWN`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from mmdlm.data.scenes import PictureWorld
from mmdlm.errors import InputError
from mmdlm.models.growing import first_bits, grown_predictor
from mmdlm.models.visual_tokenizer import saved_tokenizer
from mmdlm.pipelines import TextToImage
from mmdlm.processing import MMDLMProcessor
from mmdlm.training.arguments import config_from_arguments, run_program


@dataclass
class Config:
    """What grows, and into what."""

    model: str = ""
    tokenizer: str = ""  # default: the model's own
    data: str = ""  # a picture world
    out: str = ""
    concepts: int = 300
    styles: list[str] = field(default_factory=lambda: ["twemoji"])
    text_vocab_size: int = 2048
    scenes: int = 4000  # whose words the text tokenizer is learned on
    compared: int = 64  # of them, whose codes are compared


def main(arguments: list[str]) -> None:
    config = config_from_arguments(Config, arguments, program=__file__)
    for name in ("model", "data", "out"):
        if not getattr(config, name):
            raise InputError(f"{name} is empty: give {name}=DIR.")
    if Path(config.out).exists():
        raise InputError(f"{config.out} is there already, expected a new directory: give another out.")
    pipe = TextToImage.from_pretrained(config.model)
    tokenizer = saved_tokenizer(config.tokenizer) if config.tokenizer else pipe.visual_tokenizer
    before, after = (each.config["codebook_bits"] for each in (pipe.visual_tokenizer, tokenizer))
    if after < before or tokenizer.config["bit_order"] != pipe.visual_tokenizer.config["bit_order"]:
        raise InputError(f"The tokenizer has {after} bits, the model's {before}: expected one that was grown from it.")

    # 1. Words.
    side = pipe.processor.image_size
    world = PictureWorld(config.data, split="train", resolution=side, concepts=config.concepts, styles=config.styles)
    scenes = [world.scene(seed) for seed in range(config.scenes)]
    texts = [text for scene in scenes for text in scene.captions]
    texts += [text for scene in scenes for question, answer, _ in scene.questions for text in (question, answer)]
    processor = MMDLMProcessor.of_words(texts, config.text_vocab_size, tokenizer.codebook_size, side)
    old, tokens = pipe.processor.tokenizer, processor.tokenizer.convert_ids_to_tokens(range(len(processor.tokenizer)))
    known = old.get_vocab()
    spelled = processor.tokenizer.convert_tokens_to_string
    pieces = [[known[token]] if token in known else pipe.processor.text_ids(spelled([token])) for token in tokens]

    # 2. Codes: do they begin with the model's?
    pixels = torch.from_numpy(np.stack([scene.image for scene in scenes[: config.compared]])).movedim(-1, 1) / 127.5 - 1
    now = first_bits(tokenizer.encode(pixels), before, after, tokenizer.config["bit_order"])
    kept = float((now == pipe.visual_tokenizer.encode(pixels)).float().mean())

    model = grown_predictor(pipe.model, processor.vocabulary, pieces=pieces, code_bits=after)
    grown = TextToImage(model=model, visual_tokenizer=tokenizer, processor=processor)
    grown.presets = pipe.presets
    grown.save_pretrained(config.out)
    new = sum(token not in known for token in tokens)
    print(
        f"{config.out}: {len(tokens)} text ids, {new} of them new; codes of {after} bits instead of {before}, "
        f"{100 * kept:.2f} % of the cells of {config.compared} scenes keep their first bits"
    )


if __name__ == "__main__":
    run_program(main)
