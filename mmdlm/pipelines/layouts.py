"""Which layout a pipeline's canvas has: mmdlm's own (`mmdlm.sequence`), or the one a published model was trained on.

A published model is known by `MaskPredictorConfig.published`. MMaDA's (arXiv:2505.15809) are those of `mmdlm.prompts`:

    draw            iPAD ... t2i bos <prompt> eos    soi <h*w codes> eoi    the codes are editable
    describe, ask   mmu soi <codes> eoi    <its chat template around the question>    <answer>    the answer is editable

Rows are made without padding; the batch pads them on the left, where nobody sees it, so that it matters to no number
how long the released program's rows are. h x w the grid of codes, L places of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmdlm import prompts, sequence
from mmdlm.errors import InputError
from mmdlm.processing import MMDLMProcessor
from mmdlm.sequence import IMAGE, TEXT, Canvas
from mmdlm.vocabulary import Vocabulary

MMADA = "mmada"
MMADA_TEXT_LENGTH = 512  # the longest prompt that MMaDA was trained with, its bos and eos included
MMADA_CAPTION = "Please describe this image in detail."  # it has no captions but as answers

# How the words of MMaDA that are no part of a vocabulary are spelled in its text tokenizer.
_MMADA_WORDS = {
    "start_header": "<|start_header_id|>",
    "end_header": "<|end_header_id|>",
    "eot": "<|eot_id|>",
    "left_pad": "[iPAD]",
}


def draw_canvas(prompt: str, grid: tuple[int, int], processor: MMDLMProcessor, family: str) -> Canvas:
    """Text -> a picture to be made, [L]; the empty prompt is the canvas without a condition, for guidance.

    `family`: the published one, "" for mmdlm's own. Raises InputError for a family that has no such layout, and for a
    prompt longer than MMaDA was trained with (its released program cuts it).
    """
    words, vocabulary = processor.text_ids(prompt), processor.vocabulary
    if family != MMADA:
        check_own(family, vocabulary, "drawing")
        return sequence.draw_canvas(words, None, grid, vocabulary)
    ids = _mmada_ids(processor, "bos", "eos", "soi", "eoi", "t2i")
    length = len(words) + 1 + (words[:1] != [ids.bos])
    if length > MMADA_TEXT_LENGTH:
        raise InputError(
            f"The prompt is too long by {length - MMADA_TEXT_LENGTH} tokens, MMaDA was trained with at most "
            f"{MMADA_TEXT_LENGTH}: shorten it."
        )
    masks = torch.full((1, grid[0] * grid[1]), vocabulary.mask_id)
    made = prompts.mmada_t2i([words], masks, max_text_length=length, ids=ids)
    return _canvas(made.ids[0], ~made.given[0], ~made.given[0], grid)


def answer_canvas(
    codes: Tensor,
    question: str | None,
    answer_length: int,
    grid: tuple[int, int],
    processor: MMDLMProcessor,
    family: str,
) -> Canvas:
    """Picture, int [h, w], and question -> an answer to be found, [L]; without a question its caption.

    `family` as for `draw_canvas`. Raises InputError for a family that has no such layout.
    """
    vocabulary = processor.vocabulary
    if family != MMADA:
        check_own(family, vocabulary, "describing")
        if question is None:
            return sequence.describe_canvas(codes, grid, None, answer_length, vocabulary)
        return sequence.ask_canvas(codes, grid, processor.text_ids(question), None, answer_length, vocabulary)
    ids = _mmada_ids(processor, "bos", "eos", "soi", "eoi", "mmu", "start_header", "end_header", "eot")
    asked = [{"role": "user", "content": MMADA_CAPTION if question is None else question}]
    chat = prompts.chat(asked, processor.text_ids, ids=ids, newline="\n")
    given = prompts.mmada_question([chat], vocabulary.image_ids(codes).view(1, -1).cpu(), ids=ids).ids[0]
    row = torch.cat([given, given.new_full((answer_length,), vocabulary.mask_id)])
    return _canvas(row, vocabulary.is_image(row), torch.arange(len(row)) >= len(given), grid)


def pad_id(processor: MMDLMProcessor, family: str) -> int:
    """The id that rows are padded with on the left."""
    return _mmada_ids(processor).left_pad if family == MMADA else processor.vocabulary.pad_id


def check_own(family: str, vocabulary: Vocabulary, doing: str) -> None:
    """Raises InputError for a published model that knows no layout of mmdlm's own; `doing` names what was asked for."""
    if family == MMADA or (family and min(vocabulary.draw_id, vocabulary.describe_id) < 0):
        raise InputError(
            f"This is a published model of the family {family}, for which there is no layout for {doing} here, "
            "expected a model trained with mmdlm: take another, or compose the canvas with mmdlm.prompts."
        )


def _mmada_ids(processor: MMDLMProcessor, *needed: str) -> prompts.MMaDAIds:
    """MMaDA's ids: the published ones, or what a model of another size says. InputError where a needed one is unknown.

    Nobody sees the padding, so any id will do for it.
    """
    vocabulary, published = processor.vocabulary, prompts.MMaDAIds()
    if (vocabulary.boi_id, vocabulary.draw_id) == (published.soi, published.t2i):
        return published
    spelled = processor.tokenizer.backend_tokenizer.token_to_id
    found = {name: spelled(word) for name, word in _MMADA_WORDS.items()}
    found |= {"bos": vocabulary.bos_id, "eos": vocabulary.eos_id, "mask": vocabulary.mask_id}
    found |= {"soi": vocabulary.boi_id, "eoi": vocabulary.eoi_id, "t2i": vocabulary.draw_id, "mmu": vocabulary.ask_id}
    known = {name: value for name, value in found.items() if value is not None and value >= 0}
    if missing := [name for name in needed if name not in known]:
        raise InputError(
            f"This MMaDA is not of the published size and its id of {', '.join(missing)} is unknown: convert it again "
            "with --id for bos_id, boi_id, eoi_id, draw_id, describe_id and ask_id and a tokenizer that has "
            f"{', '.join(list(_MMADA_WORDS.values())[:3])}."
        )
    return prompts.MMaDAIds(**dict.fromkeys(found, -1) | {"left_pad": vocabulary.mask_id} | known)


def _canvas(ids: Tensor, of_picture: Tensor, editable: Tensor, grid: tuple[int, int]) -> Canvas:
    """Ids [L] with one picture at `of_picture`, bool [L], as a canvas."""
    cells = ids.new_full((len(ids), 2), -1)
    cells[of_picture] = torch.cartesian_prod(*map(torch.arange, grid))
    return Canvas(ids, torch.where(of_picture, IMAGE, TEXT), editable, torch.arange(len(ids)), cells)
