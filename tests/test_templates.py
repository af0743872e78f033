"""Templates: how they are read, laid out as tokens, and refused."""

import pytest
import torch

from mmdlm.errors import InputError
from mmdlm.templates import Hole, combinations, lay_out, parse_template
from mmdlm.vocabulary import Vocabulary

WORDS = Vocabulary(text_size=200, image_start=200, image_size=4, mask_id=1, bos_id=2, eos_id=3, pad_id=0, boi_id=4,
                   eoi_id=5, draw_id=6, describe_id=7, ask_id=8)
M, E = 1, 3


def letters(text: str) -> list[int]:
    """One token a letter, so that lengths and spaces can be counted."""
    return [ord(letter) for letter in text]


def spelled(row: torch.Tensor) -> str:
    return "".join({M: "_", E: "."}.get(token, chr(token)) for token in row.tolist())


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("plain", ["plain"]),
        ("", []),
        ("The [MASK:2] is [MASK]", ["The ", Hole(2), " is ", Hole(1)]),
        ("[MASK:{red|light blue}] and [MASK:*]", [Hole(0, ("red", "light blue")), " and ", Hole()]),
        ("[MASK: 3 ][MASK:1]", [Hole(3), Hole(1)]),
        ("[MASK:2:/[a-z]+/] b", [Hole(2, pattern="[a-z]+"), " b"]),
        ("a [MASK:*:/(b|c])/]", ["a ", Hole(pattern=" (?:(b|c]))")]),
        ("a [mask] of [MASKS", None),
    ],
)
def test_how_a_template_is_read(text, parts):
    if parts is None:
        with pytest.raises(InputError, match="not closed"):
            parse_template(text)
    else:
        assert parse_template(text) == parts


def test_a_hole_takes_the_space_before_it():
    layout = lay_out(parse_template("ab [MASK:2] c [MASK:1]"), letters, WORDS)
    assert [spelled(row) for row in layout.ids] == ["ab__ c_."]
    assert "".join("01"[free] for free in layout.free[0].tolist()) == "00110010"
    assert not layout.open.any() and not layout.chosen.any()
    assert spelled(lay_out(parse_template("x[MASK:1]y"), letters, WORDS).ids[0]) == "x_y."
    assert spelled(lay_out(parse_template("hi"), letters, WORDS, least=5).ids[0]) == "hi..."


def test_every_combination_of_choices_gets_a_row_of_one_length():
    parts = parse_template("a [MASK:{red|ok}] b [MASK:{x|y}]")
    assert combinations(parts) == [("red", "x"), ("red", "y"), ("ok", "x"), ("ok", "y")]
    layout = lay_out(parts, letters, WORDS)
    assert [spelled(row) for row in layout.ids] == ["a red b x.", "a red b y.", "a ok b x..", "a ok b y.."]
    assert ["".join("-x"[chosen] for chosen in row) for row in layout.chosen.tolist()] == [
        "-xxxx--xx-", "-xxxx--xx-", "-xxx--xx--", "-xxx--xx--"]


def test_the_open_hole_goes_to_the_end():
    layout = lay_out(parse_template("a [MASK:1] [MASK:*]"), letters, WORDS, least=6)
    assert spelled(layout.ids[0]) == "a_____"
    assert layout.open[0].tolist() == [False, False, True, True, True, True]
    assert spelled(lay_out(parse_template("abc[MASK:*]"), letters, WORDS).ids[0]) == "abc_"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[MASK:0]", "is no hole"),
        ("[MASK:-1]", "is no hole"),
        ("[MASK:two]", "is no hole"),
        ("[MASK:]", "is no hole"),
        ("[MASK:{red}]", "no two different choices"),
        ("[MASK:{red|}]", "no two different choices"),
        ("[MASK:{red|red}]", "no two different choices"),
        ("[MASK:2", "not closed"),
        ("[MASK:*] more", "expected it last"),
        ("[MASK:*][MASK:*]", "expected it last"),
        ("[MASK:{a|b|c|d|e}]" * 4, "more than 512 combinations"),
    ],
)
def test_a_bad_template_is_one_sentence(text, words):
    with pytest.raises(InputError, match=words) as raised:
        parse_template(text)
    assert "\n" not in str(raised.value)


def test_the_places_of_a_pattern_are_counted_hole_by_hole():
    layout = lay_out(parse_template("a[MASK:1:/b/] [MASK:{c|dd}][MASK:*:/e/]"), letters, WORDS, least=7)
    assert layout.pattern.tolist() == [[0, 1, 0, 0, 2, 2, 2], [0, 1, 0, 0, 0, 2, 2]]
    with pytest.raises(InputError, match="has no tokens"):
        parse_template("[MASK:0:/a/]")
