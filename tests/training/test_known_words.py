"""Words of a run's rows beside its weights: a sample by the sources' weights, read back as it was written."""

from __future__ import annotations

import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from mmdlm.assets import shipped_model
from mmdlm.errors import InputError
from mmdlm.training.known_words import FILE, read_words, some_words, write_words
from mmdlm.training.rows import Pool


class Words(SimpleNamespace):
    def __len__(self) -> int:
        return len(self.captions)


def pool(name: str, count: int, weight: float) -> Pool:
    captions = [[f"{name} {n}", f"the {name} {n}", f"{name} number {n}", f"a {name}"] for n in range(count)]
    questions = [[("what is this?", name), ("how many?", "one"), ("where?", "left")] for _ in range(count)]
    rows = Words(captions=captions, questions=questions, codes=torch.zeros(count, 2, 2), kinds=["single"] * count)
    return Pool(name, rows, weight)


def test_sources_come_by_their_weights_and_no_caption_twice():
    rows = some_words([pool("cat", 1000, 3.0), pool("dog", 1000, 1.0)], count=400)
    kinds = Counter(row["text"][0].split()[0] for row in rows)
    assert len(rows) == 400 == len({row["text"][0] for row in rows})
    assert 260 < kinds["cat"] < 340  # 300 expected, five deviations of 8.7 either way
    for row in rows:
        name = row["text"][0]
        assert len(row["text"]) == len(set(row["text"])) == 3 and all(name.split()[0] in text for text in row["text"])
        known = {"what is this?": [name.split()[0]], "how many?": ["one"], "where?": ["left"]}
        assert len(row["question"]) == 2 and [known[q] for q in row["question"]] == row["answers"]
    assert rows == some_words([pool("cat", 1000, 3.0), pool("dog", 1000, 1.0)], count=400)
    assert rows != some_words([pool("cat", 1000, 3.0), pool("dog", 1000, 1.0)], count=400, seed=1)


def test_a_small_source_is_taken_whole_and_rows_without_words_are_left_out():
    few = pool("cat", 5, 9.0)
    few.rows.captions[2] = []
    few.rows.questions[0] = []
    rows = some_words([few, pool("dog", 20, 1.0)], count=100)
    assert Counter(row["text"][0].split()[0] for row in rows) == {"cat": 4, "dog": 20}
    [silent] = [row for row in rows if row["text"][0] == "cat 0"]
    assert set(silent) == {"text"}


def test_few_rows_name_many_things():
    things = [f"thing{n}" for n in range(150)]
    often = [things[min(n % 150, n % 7 * 3)] for n in range(3000)] + things  # most rows name one of seven things
    captions = [[f"a {name} number {n}"] for n, name in enumerate(often)]
    rows = Words(captions=captions, questions=[[] for _ in often], codes=None, kinds=[])
    found = some_words([Pool("world", rows)], count=120)
    chosen = random.Random(0).sample(captions, 120)
    by_chance = {text.split()[1] for [text] in chosen}
    assert len(found) == 120 and len({row["text"][0].split()[1] for row in found}) > 2 * len(by_chance)


def test_they_are_read_as_they_were_written(tmp_path):
    rows = some_words([pool("Käse", 3, 1.0)])
    write_words(tmp_path, rows)
    assert read_words(tmp_path) == rows and [path.name for path in tmp_path.iterdir()] == [FILE]
    assert read_words(tmp_path / "nowhere") == []


@pytest.mark.parametrize("line", ["{", '{"words": ["a"]}', '{"text": []}', '{"text": ["a"], "question": ["b"]}', "[1]"])
def test_a_broken_file_is_one_sentence(line: str, tmp_path):
    (tmp_path / FILE).write_text('{"text": ["a cat"]}\n' + line + "\n")
    with pytest.raises(InputError, match="copy the model directory again"):
        read_words(tmp_path)


def test_the_shipped_model_says_what_it_knows():
    rows = read_words(shipped_model())
    said = " ".join(row["text"][0] for row in rows)
    assert len(rows) == 512
    for word in ("apple", "cherries", "open book", "soccer ball", "scissors", "small", "above", "three", "purple"):
        assert word in said
