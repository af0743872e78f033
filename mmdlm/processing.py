"""Between people's files and the model's tensors: prompts to ids and back, pictures to pixels and back.

Codes are not here: pixels to codes is the visual tokenizer's work (`mmdlm.models.visual_tokenizer`), codes to ids is
the vocabulary's (`mmdlm.vocabulary`). Shape letters: B pictures, S = `image_size`, the side in pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# diffusers finds how to load a component by looking for a base class in the component's own module:
# `ProcessorMixin` has to be a name of this module.
from transformers import PreTrainedTokenizerFast, ProcessorMixin

from mmdlm.errors import InputError
from mmdlm.picture_reading import FITS, FORMATS, LARGEST_PICTURE, Picture, fit_square, load_image
from mmdlm.text_tokenizer import train_text_tokenizer
from mmdlm.vocabulary import Vocabulary

__all__ = [
    "FITS", "FORMATS", "LARGEST_PICTURE", "MMDLMProcessor", "Picture", "ProcessorMixin", "fit_square", "load_image",
    "to_levels",
]  # fmt: skip


class MMDLMProcessor(ProcessorMixin):
    """The text tokenizer, the shared vocabulary and the picture size of one model.

    `vocabulary` may be given as a `Vocabulary` or as its `to_dict()`; `image_size` is the side in pixels of the
    square pictures the visual tokenizer was trained on; `picture_fit` says how a picture becomes such a square, see
    `fit_square`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast | None = None,
        vocabulary: Vocabulary | dict[str, Any] | None = None,
        image_size: int = 64,
        picture_fit: str = "pad",
    ) -> None:
        if vocabulary is None:
            raise InputError("MMDLMProcessor got no vocabulary, expected a Vocabulary or its to_dict(): pass one.")
        super().__init__(tokenizer=tokenizer)
        self.vocabulary = vocabulary if isinstance(vocabulary, Vocabulary) else Vocabulary.from_dict(vocabulary)
        if not isinstance(image_size, int) or image_size < 1:
            raise ValueError(f"image_size is {image_size!r}, expected the side of a picture in whole pixels")
        self.image_size = image_size
        if picture_fit not in FITS:
            raise InputError(f"picture_fit is {picture_fit!r}, expected {', '.join(FITS[:-1])} or {FITS[-1]}.")
        self.picture_fit = picture_fit

    @classmethod
    def of_words(cls, texts: Iterable[str], text_vocab_size: int, image_codes: int, image_size: int) -> MMDLMProcessor:
        """A byte-level BPE learned on `texts` and the vocabulary that it makes: text ids, then `image_codes` codes."""
        words = train_text_tokenizer(texts, text_vocab_size)
        named = ("mask", "bos", "eos", "pad", "boi", "eoi", "draw", "describe", "ask")
        ids = {f"{name}_id": words.convert_tokens_to_ids(f"<|{name}|>") for name in named}
        vocabulary = Vocabulary(text_size=len(words), image_start=len(words), image_size=image_codes, **ids)
        return cls(words, vocabulary=vocabulary.to_dict(), image_size=image_size)

    def to_dict(self) -> dict[str, Any]:
        """What `save_pretrained` writes to processor_config.json."""
        saved: dict[str, Any] = super().to_dict()
        saved["vocabulary"] = self.vocabulary.to_dict()
        return saved

    def text_ids(self, text: str) -> list[int]:
        """The ids of `text`, without any special id; [] for the empty text.

        Raises InputError for lone surrogates, which no UTF-8 can hold (a shell argument that is not valid text).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"The text has bytes that are not valid UTF-8 at character {error.start}: type it again as plain text."
            ) from error
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def text(self, ids: Sequence[int] | Tensor) -> str:
        """The text of `ids` [L] up to the first eos; special ids are left out, broken UTF-8 becomes U+FFFD."""
        listed: list[int] = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        if self.vocabulary.eos_id in listed:
            listed = listed[: listed.index(self.vocabulary.eos_id)]
        return str(self.tokenizer.decode(listed, skip_special_tokens=True)).strip()

    def pixels(self, images: Picture | Sequence[Picture]) -> Tensor:
        """Pictures of any size and mode -> float32 [B, 3, S, S] in [-1, 1].

        A picture that is not square is made so as `picture_fit` says: "pad" keeps it whole, on a square in the colour
        of its border. Raises what `load_image` raises.
        """
        pictures = [images] if isinstance(images, (str, Path, bytes, Image.Image)) else list(images)
        squares = [fit_square(load_image(picture), self.image_size, self.picture_fit) for picture in pictures]
        rows = [np.asarray(square, dtype=np.float32) for square in squares]
        return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2) / 127.5 - 1.0

    def images(self, pixels: Tensor) -> list[Image.Image]:
        """Float [B, 3, H, W] in [-1, 1] -> B pictures. Values outside the range saturate, as in any 8-bit picture."""
        return [Image.fromarray(row) for row in to_levels(pixels).cpu().numpy()]


def to_levels(pixels: Tensor, *, truncate: bool = False) -> Tensor:
    """Float [B, 3, H, W] in [-1, 1] -> uint8 [B, H, W, 3]; values outside the range saturate.

    truncate=True cuts the fraction off instead of rounding, as Show-o and MMaDA do: half a level darker on average.
    """
    pixels = pixels.detach().float().permute(0, 2, 3, 1)
    if truncate:
        return (((pixels + 1.0) / 2.0).clamp(0, 1) * 255.0).to(torch.uint8)
    return ((pixels + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
