"""What spoils a run in silence, looked for before the first step: each is one sentence, not a night's training.

A model with random weights shows little in its first loss, so most of these look at ids and words; the one about
shifted labels asks the weights that a run starts from.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmdlm import attention
from mmdlm.errors import InputError
from mmdlm.models.mask_predictor import MaskPredictor
from mmdlm.objectives import supervised_places
from mmdlm.sequence import TEXT
from mmdlm.training.masked_loss import NoisedRows, NoiseSettings, corrupt
from mmdlm.training.rows import Pool, Rows, RowSettings
from mmdlm.vocabulary import Vocabulary

FEWEST_PLACES = 20  # that `check_alignment` judges by


def warnings(
    rows: Rows,
    settings: NoiseSettings,
    model: MaskPredictor,
    *,
    tokenizer_mask_id: int | None,
    guidance_scale: float,
    fresh: bool,
) -> list[str]:
    """Runs every check on the first rows; raises InputError for what cannot go well, returns sentences for the rest.

    fresh: the weights are random, so that what a trained model may survive is refused.
    """
    vocabulary = rows.vocabulary
    batch = rows.batch(0, 32)
    check_mask_id(vocabulary, tokenizer_mask_id, rows.pools, batch.canvas.ids)
    found = word_warnings(rows.pools, rows.settings, guidance_scale=guidance_scale, fresh=fresh)
    if not fresh:
        generator = torch.Generator().manual_seed(0)
        noised = corrupt(*batch, mask_id=vocabulary.mask_id, settings=settings, generator=generator)
        check_alignment(model, noised.to(model.device))
    return found


def check_mask_id(vocabulary: Vocabulary, tokenizer_mask_id: int | None, pools: Sequence[Pool], ids: Tensor) -> None:
    """The mask must be the text tokenizer's own mask, where it has one, and must never be said: ids [...] of rows.

    Raises InputError: another mask would be a token that the weights know as something else.
    """
    if tokenizer_mask_id is not None and tokenizer_mask_id != vocabulary.mask_id:
        raise InputError(
            f"The vocabulary's mask_id is {vocabulary.mask_id}, but the text tokenizer's mask token has the id "
            f"{tokenizer_mask_id}: write that id into the processor's vocabulary."
        )
    if bool((ids == vocabulary.mask_id).any()):
        raise InputError(
            f"The mask_id {vocabulary.mask_id} stands in the rows of {', '.join(pool.name for pool in pools)} before "
            "anything is masked, so it is an ordinary token: give the mask an id of its own."
        )


def word_warnings(pools: Sequence[Pool], settings: RowSettings, *, guidance_scale: float, fresh: bool) -> list[str]:
    """Sentences about words that teach nothing; for a `fresh` model, which knows no words yet, the first is raised.

    guidance_scale: what the model is sampled with; above 1 it needs pictures that were learned without words.
    """
    found = []
    for pool in pools:
        captions = {caption for texts in pool.rows.captions for caption in texts}
        if len(pool.rows) > 1 and len(captions) == 1:
            found.append(
                f"All {len(pool.rows)} pictures of {pool.name} have the same caption {captions.pop()!r}, so words can "
                "tell none of them from another: caption each picture by what it shows."
            )
    if settings.draw_share > 0 and settings.prompt_dropout == 0 and guidance_scale > 1:
        found.append(
            f"prompt_dropout is 0 and pictures are drawn with guidance_scale {guidance_scale:g}, whose branch without "
            "words is then never trained: set prompt_dropout to about 0.1, or sample with guidance_scale 1."
        )
    if fresh and found:
        raise InputError(found[0])
    return found


@torch.no_grad()
def check_alignment(model: MaskPredictor, noised: NoisedRows) -> dict[int, float]:
    """Mean nats of the masked text places' own tokens, and of their neighbours' one place to the left and right.

    Raises InputError where a neighbour's token is far the likelier one, by half a nat and by 40 %: the labels are
    shifted against the logits, as where a model born autoregressive lacks `prediction_offset: 1`. For weights that are
    trained; random ones find all three equally unlikely. Returns {-1, 0, 1: nats}, or {} where too few places can tell.
    """
    length = noised.ids.shape[1]
    asked = noised.supervised & (noised.modality == TEXT)
    # Only places whose neighbours are other tokens, and masked too: what stands there to be seen could be repeated.
    hidden = asked.clone()
    for shift in (-1, 1):
        asked = asked & hidden.roll(-shift, 1) & (noised.targets.roll(-shift, 1) != noised.targets)
    asked[:, 0] = asked[:, length - 1] = False
    if int(asked.sum()) < FEWEST_PLACES:
        return {}
    where = supervised_places(asked)
    logits = model(
        noised.ids,
        attention_mask=attention.full(noised.documents >= 0),
        position_ids=noised.positions,
        grid=noised.grid,
        where=where,
        columns=model.vocabulary.text_columns,
    ).logits
    chosen = asked.gather(1, where)
    log_p = logits[chosen].float().log_softmax(-1)
    nats = {}
    for shift in (-1, 0, 1):
        tokens = noised.targets.roll(-shift, 1).gather(1, where)[chosen]
        nats[shift] = float(-log_p.gather(1, tokens[:, None]).mean())
    best = min(nats, key=lambda shift: nats[shift])
    if best != 0 and nats[0] - nats[best] > 0.5 and nats[best] < 0.6 * nats[0]:
        raise InputError(
            f"The model predicts the token {'after' if best > 0 else 'before'} each place better ({nats[best]:.2f} "
            f"nats) than the one at it ({nats[0]:.2f}), so labels are shifted against logits: a model born "
            "autoregressive needs prediction_offset 1 in its configuration."
        )
    return nats
