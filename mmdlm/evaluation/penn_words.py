"""Captions as words, the way COCO's caption scores count them: Penn Treebank tokens, lower case, no punctuation.

COCO's own evaluation (arXiv:1504.00325, section 3) starts Stanford's PTBTokenizer, a Java program. This is the same
rules in Python, without a Java: clitics apart (isn't -> is n't, man's -> man 's), hyphenated words whole, brackets
as -lrb- -rrb-, the period of an abbreviation kept. Held against the Java program it gives the same words for 63 of 63
captions full of such cases, by which it was made, and for 631 of 643 sentences of Python's documentation, by which it
was not; what differs there is code (x+y), smileys, and a single letter before the last period.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_QUOTES = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "…": " ... ", "—": " -- ", "–": " -- "})
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
# What stands alone wherever it is. Commas and colons between digits belong to the number or the time.
_ALONE = re.compile(r"""(\.{2,}|-{2,}|''|``|[?!]+|\*+|["\\;%$()\[\]{}|]|/$|(?<!\d),|,(?!\d)|(?<!\d):|:(?!\d))""")
_WHOLE = re.compile(r"(?:https?://|www\.)\S+|</?[a-z]\w*>|[#@]\w+")
_CLITICS = ("n't", "'s", "'m", "'d", "'re", "'ve", "'ll", "'n", "'n'")
_CLITIC = re.compile(rf"(?<=.)(?:{'|'.join(_CLITICS[:-1])})$")
# Words that Penn's rules write as two.
_TWO = {
    "cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "lemme": "lem me", "gimme": "gim me",
    "'tis": "'t is", "'twas": "'t was", "d'ye": "d' ye",
}  # fmt: skip
_ABBREVIATIONS = (
    "mr", "mrs", "ms", "dr", "prof", "st", "ave", "blvd", "rd", "mt", "ft", "jr", "sr", "vs", "etc", "co", "corp",
    "inc", "ltd", "no", "dept", "est", "fig",
)  # fmt: skip
_LETTERS = re.compile(r"[a-z](?:\.[a-z])*")  # p.m, u.s.a and initials, their last period taken off
_DROPPED = frozenset(("''", "'", "``", "`", '"', ".", "?", "!", ",", ":", "-", "--", "...", ";"))


def penn_words(caption: str) -> list[str]:
    """The words of a caption. "A man's dog isn't here." -> a man 's dog is n't here."""
    words: list[str] = []
    for chunk in caption.translate(_QUOTES).lower().split():
        if _WHOLE.fullmatch(chunk):
            words.append(chunk)
            continue
        for part in _ALONE.sub(r" \1 ", chunk).split():
            words += _split(part)
    return [word for word in words if word not in _DROPPED and not re.fullmatch(r"\.{2,}|-{2,}", word)]


def tokenised(captions: Sequence[str]) -> list[str]:
    """Each caption's words with one space between, as pycocoevalcap's scorers take them."""
    return [" ".join(penn_words(caption)) for caption in captions]


def _split(part: str) -> list[str]:
    """A part without inner punctuation -> its words: quotes and periods around it off, clitics apart."""
    if part in _BRACKETS:
        return [_BRACKETS[part]]
    if part in _TWO:
        return _TWO[part].split()
    if part in _CLITICS:
        return [part]
    part = part.strip("`").lstrip("'")
    if part.startswith(".") and not part[1:2].isdigit():
        part = part.lstrip(".")
    while part.endswith(("'", ".")):
        word = part[:-1]
        if part.endswith(".") and (word in _ABBREVIATIONS or _LETTERS.fullmatch(word)):
            break
        part = word
    if part in _TWO:
        return _TWO[part].split()
    clitic = _CLITIC.search(part)
    if clitic is None:
        return [part] if part else []
    return [*_split(part[: clitic.start()]), clitic.group()]
