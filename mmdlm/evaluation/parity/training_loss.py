"""What MMaDA (arXiv:2505.15809) and LLaDA (arXiv:2502.09992) train with: layouts, corruption, losses and gradients.

One `denoising_loss` gives every published loss; they differ in what is supervised, the weight and the normalizer:

    t2i               every label of the picture, its never masked borders included; weight 1; mean
    lm, pre-training  masked places; weight 1/p; over B L
    mmu, r2i, SFT     masked places; weight 1/p; each row over its answer's length, then the mean
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mmdlm import attention, prompts
from mmdlm.convert import from_mmdlm, load_predictor
from mmdlm.corruption import Corrupted, mask
from mmdlm.evaluation.parity import Case, Check, close, equal
from mmdlm.models.mask_predictor import MaskPredictor
from mmdlm.objectives import Normalizer, denoising_loss
from mmdlm.schedules import linear, maskgit

EPS = 1e-3  # LLaDA's and MMaDA's smallest masked share of text
BORDERS = "labels as released: the picture's borders count, which are never masked"
BIAS = "mmada_training_bias: the released float mask is added to the scores and hides nothing"
RELEASED = "exact='released': argsort taken for a rank"


def checks(case: Case) -> Iterator[Check]:
    """Layouts and corruption first, then the losses of each kind, and the gradients of their sum."""
    model = load_predictor(case.directory, dtype=torch.float32, vocabulary=_vocabulary(case))
    yield from _layouts(case)
    yield from _corruption(case)
    yield from _mmada(case, model)
    yield from _llada(case, model)


def _vocabulary(case: Case) -> dict[str, int]:
    """The tiny checkpoint has no tokenizer: where image codes start is its length, as for the published model."""
    size = case.named_ids.get("text_size")
    return {} if size is None else {"text_size": size, "image_start": size}


def _ids(case: Case) -> prompts.MMaDAIds:
    names = {"bos": "bos", "eos": "eos", "mask": "mask", "start_header": "<|start_header_id|>",
             "end_header": "<|end_header_id|>", "eot": "<|eot_id|>", "soi": "<|soi|>", "eoi": "<|eoi|>",
             "t2i": "<|t2i|>", "mmu": "<|mmu|>", "left_pad": "[iPAD]", "r2i": "<|r2i|>"}  # fmt: skip
    return prompts.MMaDAIds(**{ours: case.named_ids[theirs] for ours, theirs in names.items()})


def _layouts(case: Case) -> Iterator[Check]:
    """The clean rows again from their texts and pictures, and how long the answers are."""
    tensors, ids, length = case.tensors, _ids(case), int(case.spec["args"]["max_text_len"])
    images = int(case.spec["args"]["num_vq_tokens"])
    texts = [row[row >= 0] for row in tensors["t2i.text_ids"]]
    drawn = prompts.mmada_t2i(texts, tensors["t2i.masked_image_ids"], max_text_length=length, ids=ids,
                              image_labels=tensors["t2i.image_labels"])  # fmt: skip
    yield equal("t2i layout", drawn.ids, tensors["input_ids"][: len(texts)])
    yield equal("t2i layout labels", drawn.labels, tensors["labels"][: len(texts)])
    yield equal("t2i layout mask", drawn.valid.long(), tensors["t2i_masks"])

    def written(part: Tensor) -> list[Tensor]:
        return [row[: int((row != ids.eos).nonzero().max()) + 1] for row in part]

    clean = {name: tensors[f"{name}.clean_ids"] for name in ("mmu", "r2i", "lmchat")}
    shown = prompts.mmada_mmu(written(clean["mmu"][:, images + 3 :]), clean["mmu"][:, 2 : images + 2],
                              max_text_length=length, ids=ids)  # fmt: skip
    reasoned = prompts.mmada_r2i(written(clean["r2i"][:, 1 : length + 1]), clean["r2i"][:, length + 2 : -1],
                                 max_text_length=length, ids=ids)  # fmt: skip
    chatted = prompts.mmada_lm_chat(written(clean["lmchat"]), length=clean["lmchat"].shape[1], ids=ids)
    lengths = {"mmu": "answer_lengths_mmu", "r2i": "r2i.answer_lengths", "lmchat": "lmchat.answer_lengths"}
    for name, prompt in (("mmu", shown), ("r2i", reasoned), ("lmchat", chatted)):
        yield equal(f"{name} layout", prompt.ids, clean[name])
        yield equal(f"{name} prompt mask", prompt.given.long(), tensors[f"{name}.prompt_masks"])
        answer = (~prompt.given).sum(dim=1, keepdim=True)
        yield equal(f"{name} answer lengths", answer.expand_as(clean[name]), tensors[lengths[name]])


def _corruption(case: Case) -> Iterator[Check]:
    """Which places the released programs mask with their seeds."""
    arguments, tensors = case.spec["args"], case.tensors
    mask_id = int(arguments["mask_token_id"])
    tokens = tensors["t2i.image_tokens"]
    seeded = torch.Generator().manual_seed(int(arguments["t2i_mask_torch_seed"]))
    t = 1 - torch.rand(len(tokens), 1, generator=seeded).double()
    drawn = mask(tokens, t, corruptible=torch.ones_like(tokens, dtype=torch.bool), mask_id=mask_id, schedule=maskgit,
                 generator=seeded, exact="released", at_least_one=True)  # fmt: skip
    share = (1 - maskgit.alpha(t))[:, 0]
    yield close("t2i masked share", share, tensors["t2i.mask_prob"], rtol=1e-6)
    yield equal("t2i masked ids", drawn.x_t, tensors["t2i.masked_image_ids"], note=RELEASED)
    labels = tokens.masked_fill(~drawn.supervised, prompts.IGNORED)
    yield equal("t2i image labels", labels, tensors["t2i.image_labels"], note=RELEASED)

    clean = tensors["llada.input_ids"]
    seeded.manual_seed(int(arguments["llada_forward_process_torch_seed"]))
    t = (1 - EPS) * torch.rand(len(clean), 1, generator=seeded) + EPS
    noisy = mask(clean, t.double(), corruptible=torch.ones_like(clean, dtype=torch.bool), mask_id=mask_id,
                 schedule=linear, generator=seeded)  # fmt: skip
    yield close("text masked share", t.expand_as(clean), tensors["rng.forward_process.p_mask"], rtol=1e-6)
    yield equal("text masked ids", noisy.x_t, tensors["rng.forward_process.noisy"])


def _mmada(case: Case, model: MaskPredictor) -> Iterator[Check]:
    arguments, tensors = case.spec["args"], case.tensors
    mask_id, tolerance = int(arguments["mask_token_id"]), _tolerance(case, "losses")
    sizes = [int(arguments[f"batch_size_{task}"]) for task in ("t2i", "lm", "mmu")]
    t2i, lm, mmu = _parts(sizes)
    ids, labels, valid = tensors["input_ids"], tensors["labels"], tensors["t2i_masks"].bool()
    everyone = torch.ones(len(ids) - len(valid), valid.shape[1], dtype=torch.bool)
    bias = prompts.mmada_training_bias(torch.cat([valid, everyone]))
    first = int(arguments["max_seq_length"]) + 1

    def drawing(logits: Tensor) -> Tensor:
        supervised = (labels[t2i] != prompts.IGNORED) & (torch.arange(ids.shape[1]) >= first)
        return denoising_loss(logits, labels[t2i], Corrupted(ids[t2i], supervised, torch.ones(supervised.shape)))

    def text(logits: Tensor, rows: slice, shares: Tensor, answers: Tensor | None = None) -> Tensor:
        return _text_loss(logits[rows], ids[rows], labels[rows], shares, answers, mask_id)

    def close_to(name: str, got: Tensor, recorded: str, note: str = "") -> Check:
        return close(name, got.detach(), tensors[recorded], note=note, **tolerance)

    model.zero_grad()
    logits = _logits(model, ids, bias)
    losses = {
        "loss_t2i": drawing(logits[t2i]),
        "loss_lm": text(logits, lm, tensors["p_mask_lm"]),
        "loss_lm_answer_lengths": text(logits, lm, tensors["p_mask_lm"], tensors["answer_lengths_lm"]),
        "loss_mmu": text(logits, mmu, tensors["p_mask_mmu"], tensors["answer_lengths_mmu"]),
    }
    for name, loss in losses.items():
        yield close_to(name, loss, name, f"{BORDERS}; {BIAS}" if name == "loss_t2i" else "")
    total = next(name for name in tensors if name.startswith("loss_total"))
    weights = [float(part) for part in total.removeprefix("loss_total_").split("_")]
    terms = (losses["loss_t2i"], losses["loss_lm"], losses["loss_mmu"])
    summed = torch.stack([weight * term for weight, term in zip(weights, terms, strict=True)]).sum()
    yield close_to("loss_total", summed, total, BIAS)
    summed.backward()
    yield from _gradients(case, model)

    with torch.no_grad():
        yield close_to("loss_forward_t2i", drawing(_logits(model, ids[t2i], bias[t2i])), "loss_forward_t2i", BIAS)
        hard = drawing(_logits(model, ids[t2i], attention.full(valid)))
        yield close_to("loss_t2i, padding hidden", hard, "loss_t2i_if_hard_masked", "the default: no option")
        yield from _others(case, model, losses)


def _others(case: Case, model: MaskPredictor, losses: dict[str, Tensor]) -> Iterator[Check]:
    """The rows that reason before they draw, and the chats."""
    tensors, tolerance = case.tensors, _tolerance(case, "losses")
    mask_id = int(case.spec["args"]["mask_token_id"])
    by_answers = {"r2i.loss_r2i": True, "lmchat.loss_lm": False, "lmchat.loss_lm_answer_lengths": True}
    for recorded, by_answer in by_answers.items():
        part = case.run(recorded.partition(".")[0])
        answers = part["answer_lengths"] if by_answer else None
        logits = _logits(model, part["input_ids"], None)
        loss = _text_loss(logits, part["input_ids"], part["labels"], part["p_mask"], answers, mask_id)
        yield close(recorded, loss, tensors[recorded], **tolerance)
    same = {"r2i.loss_t2i": "loss_t2i", "r2i.loss_lm": "loss_lm_answer_lengths", "r2i.loss_mmu": "loss_mmu"}
    for recorded, name in same.items():  # rows are independent: r2i rows beside them change nothing
        yield close(recorded, losses[name].detach(), tensors[recorded], **tolerance)


def _llada(case: Case, model: MaskPredictor) -> Iterator[Check]:
    tensors, tolerance, mask_id = case.tensors, _tolerance(case, "losses"), int(case.spec["args"]["mask_token_id"])
    clean, shares = tensors["llada.input_ids"], tensors["llada.p_mask"]
    answers = (clean.shape[1] - tensors["llada.prompt_lengths"])[:, None].expand_as(clean)
    for name, lengths in (("pretrain", None), ("sft", answers)):
        noisy = tensors[f"llada.noisy_{name}"]
        with torch.no_grad():
            loss = _text_loss(_logits(model, noisy, None), noisy, clean, shares, lengths, mask_id)
        yield close(f"llada.loss_{name}", loss, tensors[f"llada.loss_{name}"], **tolerance)


def _gradients(case: Case, model: MaskPredictor) -> Iterator[Check]:
    """Our gradients under the published names: the converter only copies, so it carries them as it does weights."""
    ours = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    theirs, _ = from_mmdlm(ours, model.config)
    tolerance = _tolerance(case, "grads")
    norm = torch.stack([gradient.double().pow(2).sum() for gradient in theirs.values()]).sum().sqrt()
    yield close("grad_global_norm", norm, case.tensors["grad_global_norm"], **tolerance)
    for name, recorded in case.run("grad").items():
        yield close(f"grad {name.removeprefix('model.transformer.')}", theirs[name], recorded, **tolerance)


def _text_loss(
    logits: Tensor, ids: Tensor, labels: Tensor, shares: Tensor, answers: Tensor | None, mask_id: int
) -> Tensor:
    """Masked places by 1/p; over all places of the batch, or each row over its own answer and then over the rows."""
    corrupted = Corrupted(ids, ids == mask_id, 1 / shares)
    normalizer: Normalizer = float(ids.numel()) if answers is None else answers[:, 0]
    return denoising_loss(logits, labels, corrupted, normalizer)


def _logits(model: MaskPredictor, ids: Tensor, mask_or_bias: Tensor | None) -> Tensor:
    logits: Tensor = model(ids, attention_mask=mask_or_bias).logits
    return logits


def _parts(sizes: list[int]) -> list[slice]:
    stops = torch.tensor(sizes).cumsum(0).tolist()
    return [slice(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]


def _tolerance(case: Case, kind: str) -> dict[str, Any]:
    """{"rtol": ..., "atol": ...} of "rtol 1e-4, atol 1e-5"."""
    found = re.findall(r"([ra]tol) ([\d.e+-]+)", str(case.spec["tolerance"][kind]))
    return {name: float(value) for name, value in found}
