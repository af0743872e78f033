"""The prompts of the published models, id by id: LLaDA's and MMaDA's chat, MMaDA's tasks, Lumina-DiMOO's pictures.

    LLaDA    chat     bos [header user end] \\n\\n text [eot] ... [header assistant end] \\n\\n
    MMaDA    t2i      iPAD ... t2i bos text eos   soi codes eoi
             mmu      mmu soi codes eoi   bos text eos eos ...
             r2i      r2i bos text eos eos ...    soi codes eoi
             lm       bos text eos eos ...
    Lumina   picture  text  answer-start  boi (codes of a line, newline) per line eoi  answer-end

LLaDA arXiv:2502.09992, MMaDA arXiv:2505.15809, Lumina-DiMOO arXiv:2510.06308. Only t2i is padded on the left; the eos
that fill the others are seen by everybody and learned, so that the model says by them where its answer ends. Image ids
come from `Vocabulary.image_ids`: MMaDA's start at the length of the text tokenizer. The shipped model's own layouts are
in `mmdlm.sequence`.

B rows, N image codes, T the `max_text_length` that a model was trained with, L = T + N + 3 places of a row with both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdlm.errors import InputError

IGNORED = -100  # the label of a place that is no target

Ids = Sequence[int] | Tensor  # text ids [n], without any special id but those the text itself has
Encode = Callable[[str], Sequence[int]]  # text -> ids, nothing added; `MMDLMProcessor.text_ids` is one


@dataclass(frozen=True)
class LLaDAIds:
    """Special ids of LLaDA's text tokenizer, those of the published models by default."""

    bos: int = 126080
    eos: int = 126081
    mask: int = 126336
    start_header: int = 126346
    end_header: int = 126347
    eot: int = 126348


@dataclass(frozen=True)
class MMaDAIds(LLaDAIds):
    """LLaDA's, and what MMaDA made of reserved ones."""

    soi: int = 126084
    eoi: int = 126085
    t2i: int = 126088
    mmu: int = 126089
    left_pad: int = 126093  # [iPAD]
    r2i: int = 126094


@dataclass(frozen=True)
class LuminaIds(LLaDAIds):
    """LLaDA's, and Lumina-DiMOO's own. 126084 is a line's end here and begins a picture in MMaDA."""

    newline: int = 126084
    boi: int = 126349
    eoi: int = 126350
    unconditional: int = 126351
    answer_start: int = 126354
    answer_end: int = 126355


class Prompt(NamedTuple):
    """Rows as the reference feeds them."""

    ids: Tensor  # int64 [B, L]
    valid: Tensor  # bool [B, L]: False where a row is padded on the left, which nobody may see
    given: Tensor  # bool [B, L]: the prompt; only the rest is corrupted in training and written in sampling
    labels: Tensor  # int64 [B, L]: the targets of the released training programs, IGNORED elsewhere


# ---------------------------------------------------------------- chat


def chat(messages: Sequence[Mapping[str, str]], encode: Encode, *, ids: LLaDAIds, newline: str = "\n\n") -> list[int]:
    """LLaDA's chat template, up to where the answer begins. MMaDA's is the same with `newline="\\n"`.

    messages: {"role": "user", "content": ...} each. A special word spelled inside a content is plain text, if `encode`
    reads it so: nobody ends his own turn. Raises InputError for a message without role or content.
    """
    row = [ids.bos]
    for message in messages:
        if not {"role", "content"} <= set(message):
            raise InputError(f"a message has the keys {', '.join(message) or 'none'}, expected role and content: add "
                             "what is missing")
        row += [*_header(message["role"], encode, ids), *encode(newline + message["content"].strip()), ids.eot]
    return [*row, *_header("assistant", encode, ids), *encode(newline)]


def _header(role: str, encode: Encode, ids: LLaDAIds) -> list[int]:
    return [ids.start_header, *encode(role), ids.end_header]


# ---------------------------------------------------------------- MMaDA


def mmada_t2i(
    texts: Sequence[Ids],
    image_ids: Tensor,
    *,
    max_text_length: int,
    ids: MMaDAIds,
    image_labels: Tensor | None = None,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> Prompt:
    """Text to image. image_ids int64 [B, N]: ids of codes, the mask where they are to be made.

    The text with its task word has T + 1 places, padded on the left; a longer one is cut, its eos stays. `image_labels`
    [B, N]: IGNORED where no target (default: none is ignored). `dropout`: the share of rows that lose their text, one
    uniform number per row from `generator`. The labels keep the text too, as released; `given` does not.
    """
    rows = _rows(texts, image_ids)
    if dropout > 0:
        lost = torch.rand(len(rows), generator=generator) < dropout
        rows = [[] if gone else row for row, gone in zip(rows, lost.tolist(), strict=True)]
    width = max_text_length + 1
    rows = [_closed([ids.t2i, *_begun(row, ids)], width, ids) for row in rows]
    head, valid = _left_padded(rows, width, ids.left_pad)
    image, of_image = _image(image_ids, ids)
    whole, seen = torch.cat([head, image], 1), torch.cat([valid, torch.ones_like(image, dtype=torch.bool)], 1)
    labels = whole.masked_fill(~seen, IGNORED)
    if image_labels is not None:
        labels[:, width + 1 : -1] = image_labels
    return Prompt(whole, seen, torch.cat([torch.ones_like(valid), ~of_image], 1), labels)


def mmada_mmu(texts: Sequence[Ids], image_ids: Tensor, *, max_text_length: int, ids: MMaDAIds) -> Prompt:
    """Image and text to text: the picture, then T places of text filled up with eos; a longer one is cut, with an eos.

    The prompt goes up to the last `end_header` that is left, or is the picture alone; the picture is no label.
    """
    text = _closed_texts(texts, image_ids, max_text_length, ids)
    image, _ = _image(image_ids, ids)
    task = torch.full_like(image[:, :1], ids.mmu)
    whole = torch.cat([task, image, text], 1)
    of_image = torch.ones(len(texts), image.shape[1] + 1, dtype=torch.bool)
    given = torch.cat([of_image, _asked(text, ids)], 1)
    labels = torch.cat([torch.full_like(whole[:, : of_image.shape[1]], IGNORED), text], 1)
    return Prompt(whole, torch.ones_like(given), given, labels)


def mmada_r2i(texts: Sequence[Ids], image_ids: Tensor, *, max_text_length: int, ids: MMaDAIds) -> Prompt:
    """Text to reasoning and image: T places of text as in `mmada_mmu`, then the picture, both to be written.

    The prompt goes up to the last `end_header` that is left; without one the whole text is prompt.
    """
    text = _closed_texts(texts, image_ids, max_text_length, ids)
    asked = _asked(text, ids)
    asked |= ~asked.any(dim=1, keepdim=True)
    image, of_image = _image(image_ids, ids)
    whole = torch.cat([torch.full_like(text[:, :1], ids.r2i), text, image], 1)
    given = torch.cat([torch.ones_like(asked[:, :1]), asked, ~of_image], 1)
    return Prompt(whole, torch.ones_like(given), given, whole.clone())


def mmada_lm(texts: Sequence[Ids], *, length: int, ids: MMaDAIds) -> Prompt:
    """Text alone: `length` places filled up with eos; a longer one is cut, and has no eos."""
    rows = [_filled(_begun(text, ids)[:length], length, ids) for text in _rows(texts)]
    whole = torch.tensor(rows)
    nothing = torch.zeros_like(whole, dtype=torch.bool)
    return Prompt(whole, ~nothing, nothing, whole.clone())


def mmada_lm_chat(texts: Sequence[Ids], *, length: int, ids: MMaDAIds) -> Prompt:
    """`mmada_lm` of a chat: the prompt goes up to the last `end_header` that is left; without one there is none."""
    prompt = mmada_lm(texts, length=length, ids=ids)
    return prompt._replace(given=_asked(prompt.ids, ids))


def mmada_question(texts: Sequence[Ids], image_ids: Tensor, *, ids: MMaDAIds) -> Prompt:
    """A picture and a question to be answered, with `chat`'s ids for texts: what is generated comes behind it.

    No eos; rows of unlike lengths are padded on the left. All of it is given.
    """
    image, _ = _image(image_ids, ids)
    rows = [[ids.mmu, *shown, *_begun(text, ids)]
            for shown, text in zip(image.tolist(), _rows(texts, image_ids), strict=True)]  # fmt: skip
    whole, valid = _left_padded(rows, max(map(len, rows)), ids.left_pad)
    return Prompt(whole, valid, torch.ones_like(valid), torch.full_like(whole, IGNORED))


def mmada_training_bias(valid: Tensor) -> Tensor:
    """What MMaDA's released training adds to the attention scores: bool [B, L] -> float [B, 1, L, L] of 1 and 0.

    Meant as a mask, it hides nothing: a padded place weighs 1/e of a valid one. For getting the released losses; train
    with `attention.full(valid)`, as MMaDA's own sampling does.
    """
    return (valid[:, None, :, None] & valid[:, None, None, :]).float()


# ---------------------------------------------------------------- Lumina-DiMOO


def lumina_picture(
    text: Ids, image_ids: Tensor, *, ids: LuminaIds, source_ids: Tensor | None = None
) -> Prompt:
    """Text to image, or with `source_ids` text and image to image: one row, [1, L].

    image_ids int64 [height, width]: ids of codes, the mask where they are to be made. text: the whole prompt as the
    tokenizer reads it, `<uncondition>` in place of the words for the canvas that guidance leaves. source_ids int64
    [height, width] of any size stand before the text's last id, which closes the user's turn.
    """
    (row,) = _rows([text])
    if source_ids is not None:
        row = [*row[:-1], *_lines(source_ids, ids), *row[-1:]]
    picture = _lines(image_ids, ids)
    whole = torch.tensor([[*row, ids.answer_start, *picture, ids.answer_end]])
    height, width = image_ids.shape
    made = torch.zeros_like(whole, dtype=torch.bool)
    made[:, len(row) + 2 : -2].view(height, width + 1)[:, :width] = True
    return Prompt(whole, torch.ones_like(made), ~made, whole.masked_fill(~made, IGNORED))


def _lines(image_ids: Tensor, ids: LuminaIds) -> list[int]:
    if image_ids.dim() != 2 or image_ids.numel() == 0:
        raise ValueError(f"image_ids are {tuple(image_ids.shape)}, expected [height, width]: a picture has lines")
    lines = F.pad(image_ids, (0, 1), value=ids.newline)
    return [ids.boi, *lines.flatten().tolist(), ids.eoi]


# ---------------------------------------------------------------- shared by several layouts


def _rows(texts: Sequence[Ids], image_ids: Tensor | None = None) -> list[list[int]]:
    if image_ids is not None and (image_ids.dim() != 2 or len(image_ids) != len(texts)):
        raise ValueError(f"image_ids are {tuple(image_ids.shape)} for {len(texts)} texts: pass int64 [B, N]")
    if not texts:
        raise ValueError("got no text, expected at least one: pass [] as a text for an empty prompt")
    return [text.tolist() if isinstance(text, Tensor) else list(text) for text in texts]


def _begun(text: list[int], ids: LLaDAIds) -> list[int]:
    return text if text[:1] == [ids.bos] else [ids.bos, *text]


def _closed(row: list[int], room: int, ids: LLaDAIds) -> list[int]:
    """With an eos at its end, and no longer than `room`."""
    return [*row[: room - 1], ids.eos]


def _filled(row: list[int], room: int, ids: LLaDAIds) -> list[int]:
    return row + [ids.eos] * (room - len(row))


def _closed_texts(texts: Sequence[Ids], image_ids: Tensor, room: int, ids: LLaDAIds) -> Tensor:
    """int64 [B, room]: each begun, closed and filled up with eos."""
    rows = [_closed(_begun(row, ids), room, ids) for row in _rows(texts, image_ids)]
    return torch.tensor([_filled(row, room, ids) for row in rows])


def _left_padded(rows: list[list[int]], width: int, pad_id: int) -> tuple[Tensor, Tensor]:
    """int64 [B, width], and which places are no padding."""
    padded = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows])
    lengths = torch.tensor([[len(row)] for row in rows])
    return padded, torch.arange(width) >= width - lengths


def _image(image_ids: Tensor, ids: MMaDAIds) -> tuple[Tensor, Tensor]:
    """soi, codes, eoi: int64 [B, N + 2], and which places are codes."""
    whole = F.pad(image_ids, (1, 1), value=ids.soi)
    whole[:, -1] = ids.eoi
    of_image = torch.ones_like(whole, dtype=torch.bool)
    of_image[:, [0, -1]] = False
    return whole, of_image


def _asked(text: Tensor, ids: LLaDAIds) -> Tensor:
    """True up to the last end of a header in each row, int64 [B, n] -> bool [B, n]."""
    return (text == ids.end_header).flip(1).cumsum(dim=1).flip(1) > 0
