"""One forward of the model for rows of any lengths, tasks and asked places.

The trunk runs once over all rows, whatever adapters they want. The head runs over what was asked and nothing else: for
each kind of place (text, picture) one product of the asked hidden states with that kind's rows of the output matrix.
Shape letters: B rows, L positions, W asked places, V columns of the logits, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmdlm import attention
from mmdlm.models.adapters import adapter_names, use_adapters
from mmdlm.models.mask_predictor import MaskPredictor
from mmdlm.serving.jobs import Question


@torch.no_grad()
def shared_forward(model: MaskPredictor, questions: Sequence[Question]) -> list[Tensor]:
    """Logits [W, V] for every question. A question's logits do not depend on the others but for rounding."""
    ids = _padded([question.ids for question in questions])
    lengths = torch.tensor([len(question.ids) for question in questions], device=ids.device)
    valid = torch.arange(ids.shape[1], device=ids.device) < lengths.unsqueeze(1)
    adapters = [question.adapter for question in questions]
    # A model that has adapters would use the last one: the base model has to be asked for, too.
    with use_adapters(model, adapters) if adapter_names(model) else nullcontext():
        hidden = model(
            ids,
            attention_mask=attention.full(valid),
            position_ids=_padded([question.positions for question in questions]),
            grid=_padded([question.grid for question in questions], -1),
            where=_padded([question.where for question in questions]),
            columns=(0, 0),  # no logits: the rows want different columns
        ).hidden
    logits: dict[int, Tensor] = {}
    for columns in {question.columns for question in questions}:
        chosen = [i for i, question in enumerate(questions) if question.columns == columns]
        counts = [len(questions[i].where) for i in chosen]
        asked = torch.cat([hidden[i, :count] for i, count in zip(chosen, counts, strict=True)])
        logits.update(zip(chosen, (asked @ model.head_rows(columns).T).split(counts), strict=True))
    return [logits[i] for i in range(len(questions))]


def _padded(rows: list[Tensor], fill: int = 0) -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=fill)
