"""The published models' prompts, id by id. MMaDA's training layouts are in tests/parity/test_mmada_prompting.py."""

from __future__ import annotations

import pytest
import torch

from mmdlm import prompts
from mmdlm.errors import InputError
from mmdlm.text_tokenizer import train_text_tokenizer

LLADA = prompts.LLaDAIds()
# the ids that the recorded tiny models use
MMADA = prompts.MMaDAIds(
    bos=211, eos=212, mask=216, start_header=213, end_header=214, eot=215, soi=200, eoi=201, t2i=204, mmu=205,
    left_pad=209, r2i=210,
)  # fmt: skip
LUMINA = prompts.LuminaIds(
    eos=217, mask=216, newline=200, boi=210, eoi=211, unconditional=212, answer_start=218, answer_end=219
)


def characters(text: str) -> list[int]:
    return [ord(character) for character in text]


def test_a_chat_is_headers_texts_and_ends_of_turn():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "  Why?\n"},
        {"role": "assistant", "content": "So."},
        {"role": "user", "content": "Go on"},
    ]
    written = []
    for role, text in (("system", "Be brief."), ("user", "Why?"), ("assistant", "So."), ("user", "Go on")):
        written += [126346, *characters(role), 126347, *characters("\n\n" + text), 126348]
    expected = [126080, *written, 126346, *characters("assistant"), 126347, *characters("\n\n")]
    assert prompts.chat(messages, characters, ids=LLADA) == expected
    short = prompts.chat(messages[1:2], characters, ids=MMADA, newline="\n")
    assistant = [213, *characters("assistant"), 214, 10]
    assert short == [211, 213, *characters("user"), 214, *characters("\nWhy?"), 215, *assistant]


def test_nobody_ends_his_own_turn_by_spelling_a_special_word():
    tokenizer = train_text_tokenizer(["hello"], 265)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    ids = prompts.LLaDAIds(bos=2, eos=3, mask=1, start_header=4, end_header=5, eot=6)
    row = prompts.chat([{"role": "user", "content": "<|eoi|><|mask|>"}], encode, ids=ids)
    assert row.count(ids.eot) == 1 and row.count(ids.end_header) == 2 and ids.mask not in row
    assert "<|eoi|><|mask|>" in tokenizer.decode(row)


@pytest.mark.parametrize("message", [{"role": "user"}, {"content": "hello"}, {}])
def test_a_message_without_role_or_content(message):
    with pytest.raises(InputError, match="expected role and content"):
        prompts.chat([message], characters, ids=LLADA)


def test_the_recorded_question_of_mmada():
    recorded = [205, 200, 273, 220, 259, 224, 238, 263, 281, 277, 235, 201, 211, 50, 108, 124, 40, 184, 214]
    prompt = prompts.mmada_question([[50, 108, 124, 40, 184, 214]], torch.tensor([recorded[2:11]]), ids=MMADA)
    assert prompt.ids.tolist() == [recorded]
    assert bool(prompt.given.all()) and bool(prompt.valid.all())
    # a shorter question beside it is padded on the left, and nobody sees the padding
    both = prompts.mmada_question(
        [[211, 50], [50, 108, 124, 40, 184, 214]], torch.tensor([recorded[2:11]] * 2), ids=MMADA
    )
    assert both.ids.tolist() == [[209] * 5 + [*recorded[:12], 211, 50], recorded]
    assert both.valid.tolist() == [[False] * 5 + [True] * 14, [True] * 19]


def test_mmada_writes_only_the_codes_of_a_picture_it_draws():
    codes = torch.tensor([[220, 216, 216]])
    prompt = prompts.mmada_t2i([[7, 8]], codes, max_text_length=5, ids=MMADA)
    assert prompt.ids.tolist() == [[209, 204, 211, 7, 8, 212, 200, 220, 216, 216, 201]]
    assert prompt.valid.tolist() == [[False] + [True] * 10]
    assert prompt.given.tolist() == [[True] * 7 + [False] * 3 + [True]]
    # a text of one id more than there is room for is cut, and its eos stays
    cut = prompts.mmada_t2i([[1, 2, 3, 4, 5]], codes, max_text_length=5, ids=MMADA)
    assert cut.ids.tolist()[0][:6] == [204, 211, 1, 2, 3, 212]


def test_the_released_bias_of_mmada_hides_nothing():
    bias = prompts.mmada_training_bias(torch.tensor([[False, True, True]]))
    assert bias.tolist() == [[[[0, 0, 0], [0, 1, 1], [0, 1, 1]]]]


RECORDED = [186, 82, 156, 24, 28, 190, 13, 218, 210, *([216] * 4 + [200]) * 4, 211, 219]
SHOWN = [[231, 279, 274, 239], [257, 245, 256, 260], [267, 256, 263, 263]]
RECORDED_WITH_PICTURE = [
    107, 28, 152, 117, 182, 210, 231, 279, 274, 239, 200, 257, 245, 256, 260, 200, 267, 256, 263, 263, 200, 211, 12,
    218, 210, 216, 216, 216, 216, 200, 216, 216, 216, 216, 200, 216, 216, 216, 216, 200, 211, 219,
]  # fmt: skip


def test_the_recorded_prompts_of_lumina():
    prompt = prompts.lumina_picture(RECORDED[:7], torch.full((4, 4), 216), ids=LUMINA)
    assert prompt.ids.tolist() == [RECORDED]
    assert (prompt.ids[~prompt.given] == 216).all() and int((~prompt.given).sum()) == 16
    source = torch.tensor(SHOWN)
    text = [107, 28, 152, 117, 182, 12]
    prompt = prompts.lumina_picture(text, torch.full((3, 4), 216), ids=LUMINA, source_ids=source)
    assert prompt.ids.tolist() == [RECORDED_WITH_PICTURE]
    assert prompt.given.tolist() == [[i != 216 for i in RECORDED_WITH_PICTURE]]
    # the released canvas for image guidance is the same without the picture
    without = prompts.lumina_picture(text, torch.full((3, 4), 216), ids=LUMINA).ids.tolist()[0]
    assert without == [*text, *RECORDED_WITH_PICTURE[23:]]


def test_lines_of_a_picture_that_is_partly_known():
    picture = torch.tensor([[250, 216, 251], [216, 252, 216]])
    prompt = prompts.lumina_picture([1], picture, ids=LUMINA)
    assert prompt.ids.tolist() == [[1, 218, 210, 250, 216, 251, 200, 216, 252, 216, 200, 211, 219]]
    assert prompt.labels[prompt.labels != prompts.IGNORED].tolist() == picture.flatten().tolist()


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="for 2 texts"):
        prompts.mmada_t2i([[], []], torch.zeros(1, 4, dtype=torch.long), max_text_length=5, ids=MMADA)
    with pytest.raises(ValueError, match="at least one"):
        prompts.mmada_lm([], length=4, ids=MMADA)
    with pytest.raises(ValueError, match="lines"):
        prompts.lumina_picture([1], torch.zeros(4, dtype=torch.long), ids=LUMINA)


def test_the_published_ids_are_the_defaults():
    ids = prompts.MMaDAIds()
    assert [ids.soi, ids.eoi, ids.t2i, ids.mmu, ids.left_pad, ids.r2i] == [
        126084, 126085, 126088, 126089, 126093, 126094
    ]  # fmt: skip
    assert prompts.LuminaIds().newline == ids.soi, "the two id schemes clash, so neither may be taken for the other"
