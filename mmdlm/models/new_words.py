"""A vocabulary that grows: words with an id of their own, whose rows of the embedding and the head alone are trained.

A byte-level tokenizer can say everything without them; a word of its own is for a thing that many captions name
(textual inversion, arXiv 2208.01618, with the head's row beside the embedding's). New ids follow the last text id and
the image codes move up behind them, so the weights that are there keep their rows' order and their values, to the bit.

V rows of a table, n new ones, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mmdlm.errors import InputError
from mmdlm.models.mask_predictor import MaskPredictor
from mmdlm.vocabulary import Vocabulary


class InsertedRows(nn.Module):
    """A table [V, D] with trainable rows [n, D] put in before row `first`: what the model reads as its weight."""

    def __init__(self, first: int, rows: Tensor):
        super().__init__()
        self.first, self.rows = first, nn.Parameter(rows)

    def forward(self, table: Tensor) -> Tensor:
        return torch.cat([table[: self.first], self.rows.to(table.dtype), table[self.first :]])


def grown_vocabulary(vocabulary: Vocabulary, count: int) -> Vocabulary:
    """`vocabulary` with `count` more text ids; the image codes' ids move up by as many."""
    rows = vocabulary.rows + count if vocabulary.rows else 0
    moved = {"text_size": vocabulary.text_size + count, "image_start": vocabulary.image_start + count, "rows": rows}
    return replace(vocabulary, **moved)


def add_new_words(model: MaskPredictor, words: Sequence[str]) -> None:
    """Gives `model` a trainable row for each word in its two tables, at first the mean of the text's rows.

    The processor has to know the words too: `processor_with`. A word inside of a text begins with its space, " crab",
    as the tokenizer's own words do: else the space is a token of its own, which a model may never have had to write.
    Raises InputError for words that are empty or come twice, and for a model that has grown already or whose tables are
    one.
    """
    bare = [word.removeprefix(" ") for word in words]
    if not words or len(set(words)) < len(words) or not all(word.strip() == word != "" for word in bare):
        raise InputError(f"New words are {list(words)}, expected different ones, each with a space before it or none.")
    if new_words(model) or model.config.tie_word_embeddings:
        raise InputError("This model's vocabulary has grown already, or it is the head too: merge, or add no words.")
    first = model.vocabulary.text_size
    for table in _tables(model):
        weight = cast(Tensor, table.weight)
        rows = weight.detach()[:first].mean(0, keepdim=True).repeat(len(words), 1).float()
        parametrize.register_parametrization(table, "weight", InsertedRows(first, rows), unsafe=True)
        table.parametrizations.weight.original.requires_grad_(False)
    model.vocabulary = grown_vocabulary(model.vocabulary, len(words))
    model.config.vocabulary = model.vocabulary.to_dict()
    cast(Any, model).new_words = list(words)


def processor_with(processor: Any, words: Sequence[str]) -> Any:
    """A processor of the same kind that knows the words as ids of their own.

    Raises InputError where the tokenizer has one of them already.
    """
    import copy

    tokenizer = copy.deepcopy(processor.tokenizer)
    added = tokenizer.add_tokens(list(words))
    if added < len(words) or len(tokenizer) != processor.vocabulary.text_size + len(words):
        raise InputError(f"The words {', '.join(words)} are not all new to this tokenizer: leave out those it has.")
    vocabulary = grown_vocabulary(processor.vocabulary, len(words))
    return type(processor)(
        tokenizer, vocabulary=vocabulary, image_size=processor.image_size, picture_fit=processor.picture_fit
    )


def new_words(model: nn.Module) -> list[str]:
    """The words that `model` was given, in the order of their ids."""
    return list(getattr(model, "new_words", []))


def new_rows(model: MaskPredictor) -> dict[str, nn.Parameter]:
    """{"new_rows.embedding", "new_rows.head": [n, D]}, the rows that are trained; {} for a model without new words."""
    names = ("new_rows.embedding", "new_rows.head")
    if not new_words(model):
        return {}
    return {name: table.parametrizations.weight[0].rows for name, table in zip(names, _tables(model), strict=True)}


def settle_new_words(model: MaskPredictor) -> None:
    """Makes the rows part of the tables themselves: a plain model with a larger vocabulary."""
    if new_words(model):
        for table in _tables(model):
            parametrize.remove_parametrizations(table, "weight", leave_parametrized=True)
            table.weight.requires_grad_(True)  # the old rows were frozen beside the new ones
        del cast(Any, model).new_words


def _tables(model: MaskPredictor) -> tuple[Any, Any]:
    return model.get_input_embeddings(), model.head
