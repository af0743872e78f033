"""Mixtures by weight, and their continuation in another process: the very items that would have come."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from mmdlm.data.mixture import Mixture, PairStream
from mmdlm.errors import InputError

# Run as a program: takes `count` items after the state in the file, if there is one, and prints them and the new state.
PROGRAM = """
import json, sys
from pathlib import Path
import datasets
from mmdlm.data.mixture import Mixture, PairStream
from mmdlm.data.paired import open_pairs

def mixture(place, **settings):
    files = sorted(str(path) for path in (place / "stream").iterdir())
    streamed = datasets.load_dataset("json", data_files=files, split="train", streaming=True,
                                     cache_dir=str(place / "cache"))
    sources = [(list(range(7)), 2.0), (streamed, 1.0), (PairStream(place / "pictures"), 1.0),
               (open_pairs(place / "pictures"), 0.5)]
    return Mixture(sources, seed=3, block=4, **settings)

def name(drawn):
    item = drawn.item
    return f"{drawn.source}:{item['n'] if isinstance(item, dict) else getattr(item, 'key', item)}"

if __name__ == "__main__":
    place, count, state = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    items = mixture(place)
    if state:
        items.load_state_dict(state)
    names = [name(next(items)) for _ in range(count)]
    print(json.dumps([names, items.state_dict()]))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stream of ten lines in two files, and a folder of five pictures of which one is broken."""
    path = tmp_path_factory.mktemp("mixture")
    (path / "stream").mkdir()
    for part in (0, 1):
        lines = [json.dumps({"n": 100 + 5 * part + n}) for n in range(5)]
        (path / "stream" / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    (path / "pictures").mkdir()
    for number in range(5):
        Image.new("RGB", (10, 10), (number, 0, 0)).save(path / "pictures" / f"{number}.png")
        (path / "pictures" / f"{number}.txt").write_text("words" if number != 2 else "")
    (path / "program.py").write_text(PROGRAM)
    return path


def test_a_mixture_goes_on_in_another_process_as_if_nothing_had_been(place: Path):
    sys.path.insert(0, str(place))
    try:
        import program
    finally:
        sys.path.remove(str(place))
    whole = program.mixture(place)
    names, states = [], [whole.state_dict()]
    for _ in range(120):
        names.append(program.name(next(whole)))
        states.append(json.loads(json.dumps(whole.state_dict())))
    assert {name.split(":")[0] for name in names} == {"0", "1", "2", "3"}
    assert {name for name in names if name.startswith("1")} == {f"1:{n}" for n in range(100, 110)}
    assert {name for name in names if name.startswith("2")} == {"2:0.png", "2:1.png", "2:3.png", "2:4.png"}
    for stop in (0, 1, 17, 40, 119):  # within this process, at every kind of place
        again = program.mixture(place)
        again.load_state_dict(states[stop])
        assert [program.name(next(again)) for _ in range(120 - stop)] == names[stop:], stop
    run = [sys.executable, str(place / "program.py"), str(place), "83", json.dumps(states[37])]
    other = subprocess.run(run, capture_output=True, text=True, check=True)
    assert json.loads(other.stdout.splitlines()[-1]) == [names[37:], states[120]]

    halves = [program.mixture(place, process_index=index, processes=2) for index in (0, 1)]
    together = [program.name(next(halves[n % 2])) for n in range(120)]
    assert together == names


def test_shares_are_the_weights_and_epochs_are_whole():
    mixture = Mixture([(range(10), 3.0), (range(100, 140), 1.0)], seed=0)
    drawn = [next(mixture) for _ in range(4000)]
    assert 0.72 < sum(source == 0 for source, _ in drawn) / 4000 < 0.78
    first = [item for source, item in drawn if source == 0]
    for epoch in range(20):
        assert sorted(first[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert first[:10] != first[10:20]
    counts = Counter(item for source, item in drawn if source == 1)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_what_does_not_fit_is_refused(place: Path):
    with pytest.raises(InputError, match="weights"):
        Mixture([([1], 0.0)])
    with pytest.raises(InputError, match="no items"):
        Mixture([([], 1.0)])
    state = Mixture([([1, 2], 1.0)]).state_dict()
    for other in (Mixture([([1, 2, 3], 1.0)]), Mixture([([1, 2], 2.0)]), Mixture([([1, 2], 1.0)], seed=1)):
        with pytest.raises(InputError, match="continue with the data"):
            other.load_state_dict(state)
    empty = place / "broken"
    empty.mkdir()
    (empty / "a.png").write_bytes(b"")
    (empty / "a.txt").write_text("words")
    with pytest.raises(InputError, match="gave no items"):
        next(Mixture([(PairStream(empty), 1.0)]))
