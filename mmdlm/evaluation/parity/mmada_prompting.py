"""MMaDA's prompt layouts (arXiv:2505.15809), every id, mask and label of every task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict

import torch
from torch import Tensor

from mmdlm import prompts
from mmdlm.convert import llada, mmada
from mmdlm.evaluation.parity import Case, Check, equal

# The names of the released program -> ours.
NAMES = {
    "bos": "bos", "eos": "eos", "mask": "mask", "start_header": "start_header", "end_header": "end_header",
    "eot_id": "eot", "<|soi|>": "soi", "<|eoi|>": "eoi", "<|t2i|>": "t2i", "<|mmu|>": "mmu", "[iPAD]": "left_pad",
    "<|r2i|>": "r2i",
}  # fmt: skip
ALL_ONES = "the released mask of a text row is all ones, its eos included; ours says the same of what may be seen"


def checks(case: Case) -> Iterator[Check]:
    """The special ids, then per task each recorded tensor."""
    special, arguments, tensors = case.spec["special_tokens"], case.spec["args"], case.tensors
    ids = prompts.MMaDAIds(**{ours: int(special[theirs]) for theirs, ours in NAMES.items()})
    yield _published(ids, special)
    texts, chats = (_ragged(tensors[name]) for name in ("texts", "chat_texts"))
    images, labels = tensors["image_ids"], tensors["image_labels"]
    length, drop = int(arguments["max_text_len"]), arguments["t2i_dropout"]
    seeded = torch.Generator().manual_seed(int(drop["torch_manual_seed"]))
    made = {
        "t2i_gen": prompts.mmada_t2i(texts, images, max_text_length=length, ids=ids),
        "t2i": prompts.mmada_t2i(texts, images, image_labels=labels, max_text_length=length, ids=ids),
        "lm": prompts.mmada_lm(texts, length=int(arguments["lm_max_seq_len"]), ids=ids),
        "lm_short": prompts.mmada_lm(texts, length=int(arguments["lm_short_max_seq_len"]), ids=ids),
        "lm_chat": prompts.mmada_lm_chat(chats, length=int(arguments["lm_max_seq_len"]), ids=ids),
        "mmu": prompts.mmada_mmu(chats, images[: len(chats)], max_text_length=length, ids=ids),
        "r2i": prompts.mmada_r2i(chats, images[: len(chats)], max_text_length=length, ids=ids),
        "t2i_dropout": prompts.mmada_t2i(
            texts, images, dropout=float(drop["cond_dropout_prob"]), generator=seeded, max_text_length=length, ids=ids
        ),
    }
    for name, prompt in made.items():
        recorded = case.run(name)
        yield equal(f"{name} ids", prompt.ids, recorded["ids"])
        if "mask" in recorded:
            note = ALL_ONES if name.startswith("lm") else ""
            yield equal(f"{name} mask", prompt.valid.long(), recorded["mask"], note=note)
        if "prompt_mask" in recorded:
            yield equal(f"{name} prompt mask", prompt.given.long(), recorded["prompt_mask"])
        if "labels" in recorded:
            yield equal(f"{name} labels", prompt.labels, recorded["labels"])


def _published(ids: prompts.MMaDAIds, special: Mapping[str, int]) -> Check:
    """Whether the defaults here and in the converter are the recorded ids; image codes start behind the tokenizer."""
    expected = asdict(ids) | {"image_start": int(special["image_code_offset"])}
    converted = mmada.PUBLISHED_IDS
    found = asdict(prompts.MMaDAIds()) | {"image_start": llada.PUBLISHED_TEXT_SIZE}
    pairs = {"bos_id": "bos", "eos_id": "eos", "mask_id": "mask", "boi_id": "soi", "eoi_id": "eoi", "draw_id": "t2i",
             "describe_id": "mmu", "ask_id": "mmu"}  # fmt: skip
    wrong = [name for name in expected if expected[name] != found[name]]
    wrong += [name for name, ours in pairs.items() if converted[name] != expected[ours]]
    return Check("special ids", "equal" if not wrong else f"{', '.join(wrong)} differ", not wrong)


def _ragged(rows: Tensor) -> list[Tensor]:
    return [row[row >= 0] for row in rows]
