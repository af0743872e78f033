"""The text tokenizer: a byte-level BPE, so that no text is ever out of vocabulary.

Every UTF-8 byte has an id of its own, merges are learned on top (Sennrich et al., arXiv:1508.07909; on bytes: GPT-2).
Special tokens come first, in one fixed order, so that their ids are the same in every tokenizer trained here.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mmdlm.errors import InputError

SPECIAL_TOKENS = (
    "<|pad|>",
    "<|mask|>",
    "<|bos|>",
    "<|eos|>",
    "<|boi|>",
    "<|eoi|>",
    "<|draw|>",
    "<|describe|>",
    "<|ask|>",
)
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256


def train_text_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE from `texts`.

    The special tokens have the ids 0 to 8 in the order of `SPECIAL_TOKENS`; the 256 bytes follow, then the merges.
    `decode(encode(text)) == text` for any Unicode text, including one that spells a special token: plain text never
    becomes a control id (special tokens are written by `mmdlm.sequence`, as ids). The tokenizer has at most
    `vocab_size` entries; it has fewer when the texts hold no more pairs to merge.

    Raises InputError when `vocab_size` has no room for the special tokens and the 256 bytes.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise InputError(
            f"vocab_size is {vocab_size}, but {len(SPECIAL_TOKENS)} special tokens and 256 bytes need at least "
            f"{SMALLEST_VOCABULARY}: choose a larger vocab_size."
        )
    bpe = Tokenizer(models.BPE())
    # No prefix space and no normalizer: either would change the text and break the round trip.
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<|pad|>",
        mask_token="<|mask|>",
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        additional_special_tokens=list(SPECIAL_TOKENS[4:]),
        clean_up_tokenization_spaces=False,
        # Without this a prompt that spells "<|mask|>" would put a mask id into the canvas.
        split_special_tokens=True,
    )
