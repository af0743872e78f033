"""One record of paired data -> one row, or the reasons why it is none.

The columns (the same for a folder, a table and a tar): `file_name` or a picture in `image`; `text`, one caption or a
list of them; `question` + `answers`; `messages`; `mask_file_name` or `mask`; `source_file_name` or `source`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mmdlm.data.picture_contents import Content
from mmdlm.errors import InputError

MOST_CHARACTERS = 4000  # of one caption: longer ones are a mistake of the data, no model here reads them
_NO_WORDS = ("nan", "null", "none", "n/a", "<na>")  # what tables write for an empty cell
_ROLES = ("system", "user", "assistant")

Fetch = Callable[[object], Content]  # a file's name -> its content; raises InputError


@dataclass(frozen=True)
class Record:
    """What a source found at `where`: its columns, or, where they cannot be had at all, the `reason`.

    In `columns` a picture is a Content under `image`, `mask` or `source`, or a name under `file_name` and so on, which
    `fetch` looks up. `key` names the record where there is no file name; `note` is worth telling but no fault.
    """

    where: str
    columns: Mapping[str, Any] = field(default_factory=dict)
    fetch: Fetch | None = None
    key: str | None = None
    reason: str | None = None
    note: str | None = None


@dataclass(frozen=True)
class Row:
    """A record whose columns are right; no picture of it has been decoded yet.

    `questions`: pairs of a question and its answers, also what a conversation about the row's own picture begins with.
    `messages`: as given, with `pictures[name]` for every picture that a part names; a part without a name means the
    row's own picture.
    """

    key: str
    where: str
    image: Content
    texts: list[str]
    questions: list[tuple[str, list[str]]]
    messages: list[dict[str, Any]] | None
    mask: Content | None
    source: Content | None
    pictures: dict[str, Content]


def row(record: Record, *, need_text: bool = True) -> Row:
    """The row of a record. Raises InputError with all that is wrong with it, joined by "; "."""
    wrong: list[str] = []
    columns = record.columns

    def attempt(make: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return make()
        except InputError as error:
            wrong.append(str(error))
            return otherwise

    image = attempt(lambda: _content(record, "image", "file_name"), None)
    texts = attempt(lambda: _texts(columns.get("text")), [])
    questions = attempt(lambda: _questions(columns.get("question"), columns.get("answers")), [])
    pictures: dict[str, Content] = {}
    messages = attempt(lambda: _messages(columns.get("messages"), record.fetch, pictures), None)
    questions += [pair for pair in _first_exchange(messages, columns.get("file_name")) if pair not in questions]
    mask = attempt(lambda: _content(record, "mask", "mask_file_name", optional=True), None)
    source = attempt(lambda: _content(record, "source", "source_file_name", optional=True), None)
    if need_text and not wrong and not (texts or questions or messages):
        names = ", ".join(name for name in columns if name not in ("image", "file_name")) or "none"
        wrong.append(f"there is no text (the other columns are: {names}), expected text, question or messages")
    if wrong:
        raise InputError("; ".join(wrong))
    name = columns.get("file_name")
    key = record.key or (name if isinstance(name, str) else record.where)
    return Row(key, record.where, image, texts, questions, messages, mask, source, pictures)


def caption_fault(text: object) -> str | None:
    """What is wrong with one caption, question or answer; None where nothing is."""
    if isinstance(text, float) and math.isnan(text):
        return "is NaN, expected words"
    if not isinstance(text, str):
        return f"is {_named(text)}, expected words in quotes"
    if not text.strip():
        return "is empty"
    if text.strip().lower() in _NO_WORDS:
        return f"is {text.strip()!r}, what a table writes for an empty cell"
    if len(text) > MOST_CHARACTERS:
        return f"has {len(text)} characters, expected at most {MOST_CHARACTERS}"
    if "\0" in text:
        return "has a null byte in it"
    if any(0xD800 <= ord(letter) <= 0xDFFF for letter in text):
        return "is not valid UTF-8, expected UTF-8 text"
    steering = [letter for letter in text if (ord(letter) < 32 and letter not in "\t\n\r") or 127 <= ord(letter) < 160]
    if steering:
        return f"has the control character U+{ord(steering[0]):04X} in it"
    return None


def _texts(value: Any) -> list[str]:
    if value is None:
        return []
    given = value if isinstance(value, list) else [value]
    if not given:
        raise InputError("text is an empty list, expected at least one caption")
    for text in given:
        if (fault := caption_fault(text)) is not None:
            raise InputError(f"text {fault}")
    return list(dict.fromkeys(" ".join(text.split()) for text in given))


def _questions(question: Any, answers: Any) -> list[tuple[str, list[str]]]:
    """One question with a list of answers, or a list of questions with as many lists."""
    if question is None and answers is None:
        return []
    if question is None or answers is None:
        raise InputError("question is given without answers" if answers is None else "answers without a question")
    if not isinstance(answers, list):
        raise InputError(f"answers is {_named(answers)}, expected a list of them")
    pairs = [(question, answers)]
    if isinstance(question, list):
        if len(question) != len(answers):
            raise InputError(f"there are {len(question)} questions and {len(answers)} lists of answers")
        pairs = list(zip(question, answers, strict=True))
    for one, its in pairs:
        if (fault := caption_fault(one)) is not None:
            raise InputError(f"question {fault}")
        if not isinstance(its, list) or not its:
            raise InputError(f"answers is {_named(its)}, expected a list of at least one")
        for answer in its:
            if (fault := caption_fault(answer)) is not None:
                raise InputError(f"an answer {fault}")
    return [(" ".join(one.split()), [" ".join(answer.split()) for answer in its]) for one, its in pairs]


def _messages(value: Any, fetch: Fetch | None, pictures: dict[str, Content]) -> list[dict[str, Any]] | None:
    """The messages as given; fills `pictures` with what their parts name."""
    if value is None:
        return None
    if not isinstance(value, list) or not value:
        raise InputError(f"messages is {_named(value)}, expected a list of messages")
    shown = 0
    for message in value:
        if not isinstance(message, Mapping) or message.get("role") not in _ROLES:
            raise InputError(f"a message has no role, expected one of {', '.join(_ROLES)}")
        content = message.get("content")
        for part in content if isinstance(content, list) else [{"type": "text", "text": content}]:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind == "text":
                if (fault := caption_fault(part.get("text"))) is not None:
                    raise InputError(f"the text of a message {fault}")
            elif kind in ("image", "image_url"):
                shown += 1
                name = part_picture(part)
                if name is not None and fetch is not None:
                    pictures[name] = fetch(name)
            else:
                raise InputError(f"a part of a message has the type {kind!r}, expected text or image")
    if not shown:
        raise InputError('messages have no image, expected a part {"type": "image"}')
    return [dict(message) for message in value]


def _first_exchange(messages: list[dict[str, Any]] | None, own: Any) -> list[tuple[str, list[str]]]:
    """The question and the answer that a conversation begins with, where it shows nothing but the picture `own`.

    A question is answered without what was said before it, so that later turns are none: [] for them, and for a first
    turn without words or about other pictures.
    """
    said = [message for message in messages or [] if message["role"] != "system"]
    if len(said) < 2 or (said[0]["role"], said[1]["role"]) != ("user", "assistant"):
        return []
    words: list[str] = []
    for message in said[:2]:
        content = message["content"]
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        if any(part["type"] != "text" and part_picture(part) not in (None, own) for part in parts):
            return []
        words.append(" ".join(" ".join(part["text"] for part in parts if part["type"] == "text").split()))
    return [(words[0], [words[1]])] if all(words) else []


def part_picture(part: Mapping[str, Any]) -> str | None:
    """The file that an image part names; None where it means the row's own picture. Raises InputError."""
    found = part.get("image", part.get("file_name", part.get("image_url")))
    if isinstance(found, Mapping):
        found = found.get("url")
    if found is not None and not isinstance(found, str):
        raise InputError(f"an image part names {_named(found)}, expected the name of a file in the folder")
    return found


def _content(record: Record, direct: str, named: str, optional: bool = False) -> Content | None:
    found = record.columns.get(direct)
    if callable(found):
        content: Content = found
        return content
    name = record.columns.get(named)
    if name is None:
        if optional:
            return None
        columns = ", ".join(map(str, record.columns)) or "none"
        raise InputError(f"there is no {named} (the columns are: {columns})")
    if record.fetch is None:
        raise InputError(f"{named} names a file, which this source has none of: expected a picture in {direct}")
    try:
        return record.fetch(name)
    except InputError as error:
        raise InputError(f"{named}: {error}") from error


def _named(value: object) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", dict: "an object", list: "a list"}
    return names.get(type(value), "nothing" if value is None else type(value).__name__)
