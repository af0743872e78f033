"""What a place may become: words only, or one of a few given texts, each with its exact probability under the model.

Shape letters: B rows, L positions, W asked places, V columns of the logits, C candidates, N questions to the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmdlm.sampling.denoise import Predictor


def without(predict: Predictor, places: Tensor, ids: Sequence[int], *, first_id: int = 0) -> Predictor:
    """`predict` whose `ids` are shut (-inf) at `places` bool [B, L]: a hole of a template must not end the text.

    `first_id`: the id of `predict`'s first column; ids outside the columns are shut already.
    """

    def predict_without(now: Tensor, where: Tensor) -> Tensor:
        logits = predict(now, where)
        columns = [column - first_id for column in ids if 0 <= column - first_id < logits.shape[-1]]
        shut = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        shut[columns] = True
        return logits.masked_fill(places.gather(1, where).unsqueeze(-1) & shut, -torch.inf)

    return predict_without


@torch.no_grad()
def chain_log_probability(
    predict: Predictor,
    candidates: Tensor,
    scored: Tensor,
    *,
    mask_id: int,
    first_id: int = 0,
    rows_at_once: int = 32,
) -> Tensor:
    """log p of every candidate's scored places given its others, by the chain rule from left to right: float64 [C].

    candidates: int [C, L], of one layout; masks in them are unknown and stay so.
    scored: bool [C, L], a candidate's places whose tokens are in question.

    Place by place: the scored places before are shown, that one and those after are masked. The mask token is no
    answer. `predict` is called with any number of rows. Equal questions are asked once, so that candidates of one token
    each cost a single row.
    """
    owner, place = scored.nonzero().unbind(1)
    later = torch.arange(candidates.shape[1], device=candidates.device) >= place.unsqueeze(1)
    rows = candidates[owner].masked_fill(scored[owner] & later, mask_id)
    questions, which = torch.unique(torch.cat([rows, place.unsqueeze(1)], dim=1), dim=0, return_inverse=True)
    answers = []
    for part in questions.split(rows_at_once):
        logits = predict(part[:, :-1], part[:, -1:])[:, 0].double()
        if 0 <= mask_id - first_id < logits.shape[-1]:
            logits[:, mask_id - first_id] = -torch.inf
        answers.append(logits.log_softmax(dim=-1))
    found = torch.cat(answers)[which].gather(1, candidates[owner, place].unsqueeze(1) - first_id).squeeze(1)
    return torch.zeros(len(candidates), dtype=torch.float64, device=found.device).index_add(0, owner, found)
