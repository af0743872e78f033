"""Formats: the automaton's sweep against every word written out, and a format kept by every policy."""

import itertools
import json
import re

import pytest
import torch

from mmdlm.errors import InputError
from mmdlm.pipelines import ImageToText
from mmdlm.sampling.denoise import denoise
from mmdlm.sampling.draws import greedy
from mmdlm.sampling.formats import Formats, Span, automaton_of_pattern, pattern_of_schema, token_bytes
from mmdlm.sampling.policies import policy_from_config

EOS, MASK = 5, 6
TOKENS = {b"a": 0, b"b": 1, b"c": 2, b"ab": 3, b" ": 4}
TEXT = {number: text.decode() for text, number in TOKENS.items()} | {EOS: ""}
PATTERNS = ["(ab|c)+ ?a*", "a|b|c", "[abc ]*", "ab( ab)*"]


def accepted(pattern: str, ids: tuple[int, ...], ends: bool) -> bool:
    if ends and EOS in ids:
        first = ids.index(EOS)
        if set(ids[first:]) != {EOS}:
            return False
        ids = ids[:first]
    return EOS not in ids and re.fullmatch(pattern, "".join(TEXT[i] for i in ids)) is not None


def every_word(pattern: str, places: int, ends: bool, known: list[int]) -> list[tuple[int, ...]]:
    return [ids for ids in itertools.product(range(6), repeat=places)
            if accepted(pattern, ids, ends) and all(k in (MASK, i) for k, i in zip(known, ids, strict=True))]


def formats(pattern: str, places: int, ends: bool) -> Formats:
    machine = automaton_of_pattern(pattern, TOKENS, eos_id=EOS, ends=ends)
    return Formats([Span(0, torch.arange(places), machine)], mask_id=MASK)


def drawn(made: Formats, logits: torch.Tensor, known: list[int], temperature: float = 0.0, seed: int = 0):
    ids = torch.tensor([known])
    where = torch.arange(len(known)).unsqueeze(0)
    made.predict(lambda ids, where: logits)(ids, where)
    draw = made.draw(greedy, temperature=temperature)
    return draw(logits, where, ids == MASK, [torch.Generator().manual_seed(seed)])


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_words_and_marginals_are_those_of_all_words_written_out(pattern, ends):
    generator = torch.Generator().manual_seed(3)
    for known in ([MASK] * 4, [MASK, MASK, 4, MASK], [3, MASK, MASK, MASK]):
        words = every_word(pattern, 4, ends, known)
        logits = torch.randn(1, 4, 7, generator=generator) * 2
        if not every_word(pattern, 4, ends, [MASK] * 4):
            with pytest.raises(InputError, match="no text of 4 tokens"):
                formats(pattern, 4, ends)
            continue
        if not words:
            continue
        shares = logits[0].double().log_softmax(-1)
        odds = torch.tensor([sum(float(shares[p, i]) for p, i in enumerate(ids) if known[p] == MASK) for ids in words])
        columns, sure = drawn(formats(pattern, 4, ends), logits, known)
        best = words[int(odds.argmax())]
        opened = [p for p in range(4) if known[p] == MASK]
        assert [int(columns[0, p]) for p in opened] == [best[p] for p in opened]
        q = odds.double().softmax(0)
        for place in opened:
            expected = sum(float(q[n]) for n, ids in enumerate(words) if ids[place] == best[place])
            assert abs(float(sure[0, place]) - expected) < 1e-6


def test_drawn_words_follow_the_joint_distribution():
    known = [MASK] * 3
    words = every_word("[ab]+ ?", 3, True, known)
    logits = torch.tensor([[[1.0, 0.0, -1.0, 0.5, 0.0, 0.3, 9.0]] * 3])
    shares = logits[0].double().log_softmax(-1)
    q = torch.tensor([sum(float(shares[p, i]) for p, i in enumerate(ids)) for ids in words]).double().softmax(0)
    made = formats("[ab]+ ?", 3, True)
    counts = dict.fromkeys(words, 0)
    for seed in range(800):
        counts[tuple(drawn(made, logits, known, 1.0, seed)[0][0].tolist())] += 1
    seen = torch.tensor([counts[ids] for ids in words]).double() / 800
    assert float((seen - q).abs().max()) < 5 * 0.5 / 800**0.5


@pytest.mark.parametrize("policy", [{"name": "top_k"}, {"name": "threshold", "tau": 0.4}, {"name": "maskgit"},
                                    {"name": "entropy_bound", "gamma": 1.0}, {"name": "ancestral"}])
def test_every_policy_ends_with_a_word_of_the_format(policy):
    """Whatever is written first, the rest can be completed: also in blocks, where later places are not asked."""
    generator = torch.Generator().manual_seed(0)
    for trial in range(6):
        logits = torch.randn(1, 8, 7, generator=generator) * 3
        made = formats("(ab|c c)+", 8, trial % 2 == 0)
        x = torch.full((1, 8), MASK)
        predict = made.predict(lambda ids, where, logits=logits: logits.gather(1, where.unsqueeze(-1).expand(1, -1, 7)))
        states = denoise(predict, x, policy_from_config(policy), editable=x == MASK, mask_id=MASK, steps=4,
                         block=None if trial % 3 else 4, draw=made.draw(greedy),
                         generator=torch.Generator().manual_seed(trial))
        ids = tuple(list(states)[-1].x[0].tolist())
        assert accepted("(ab|c c)+", ids, trial % 2 == 0), ids


def test_a_schema_becomes_json_of_the_shipped_model():
    pipe = ImageToText.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    schema = {"type": "object", "required": ["colour", "count"],
              "properties": {"colour": {"enum": ["red", "green", "blue"]}, "count": {"type": "integer"}}}
    from PIL import Image

    picture = Image.new("RGB", (64, 64), "red")
    free = pipe(picture, "what colour is it?")
    out = pipe([picture, picture], "what colour is it?", pattern="(red|green|blue)( thing)?")
    assert out.texts[0] == out.texts[1] and re.fullmatch("(red|green|blue)( thing)?", out.texts[0])
    assert pipe(picture, "what colour is it?").texts == free.texts
    with pytest.raises(InputError, match="no text of 24 tokens"):
        pipe(picture, pattern="[0-9]{60,}")
    assert set(json.loads(pipe(picture, pattern=pattern_of_schema(schema)).texts[0])) == {"colour", "count"}


def test_what_is_no_format_is_refused():
    with pytest.raises(InputError, match="regular expression"):
        automaton_of_pattern("(a", TOKENS, eos_id=EOS)
    with pytest.raises(InputError, match="is not understood"):
        automaton_of_pattern("z+", TOKENS, eos_id=EOS)
    with pytest.raises(InputError, match="JSON schema is not understood"):
        pattern_of_schema("{")
    with pytest.raises(InputError, match="byte-level"):
        token_bytes([("▁a b", 0)], [])
    with pytest.raises(InputError, match=r"no text of 4 tokens.*nearest: 1"):
        formats("a|b|c", 4, ends=False)
