"""Paired data from folders, tars, parquet and saved data sets; who is held out; codes that are made once."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mmdlm.data.coded_pairs import coded_pairs
from mmdlm.data.paired import open_pairs, open_pictures, split_pairs
from mmdlm.data.shards import done_keys, open_shards, read_shards, shards, write_shard
from mmdlm.errors import InputError


def png(number: int, size: tuple[int, int] = (20, 16), mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    levels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(levels).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def folder(path: Path, rows: list[dict[str, Any]]) -> Path:
    """An imagefolder: the pictures that the rows name, each its own, and their metadata."""
    path.mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(rows):
        for name in (row.get("file_name"), row.get("mask_file_name"), row.get("source_file_name")):
            if name and not (path / name).exists():
                (path / name).write_bytes(png(zlib.crc32(name.encode()) + number))
    (path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_column_of_a_folder(tmp_path: Path):
    conversation = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and this?"},
                                     {"type": "image", "image": "b.png"}]},
        {"role": "assistant", "content": "a cat"},
    ]  # fmt: skip
    data = open_pairs(folder(tmp_path / "all", [
        {"file_name": "a.png", "text": ["one", " two\n words "], "question": "how many?", "answers": ["2", "two"],
         "mask_file_name": "mask.png", "source_file_name": "before.png"},
        {"file_name": "b.png", "question": ["what?", "where?"], "answers": [["this"], ["here", "there"]]},
        {"file_name": "b.png", "messages": conversation},
    ]))  # fmt: skip
    assert data.problems == [] and [row.key for row in data.rows] == ["a.png", "b.png", "b.png#2"]
    first, second, third = data
    assert first.texts == ["one", "two words"] and first.questions == [("how many?", ["2", "two"])]
    assert first.mask is not None and first.mask.mode == "L" and first.mask.size == first.image.size == (20, 16)
    assert first.source is not None and first.source.mode == "RGB" and first.messages is None
    assert second.texts == [] and second.questions == [("what?", ["this"]), ("where?", ["here", "there"])]
    assert third.messages is not None and third.questions == [("and this?", ["a cat"])]
    shown = [part["image"] for part in third.messages[0]["content"] if part["type"] == "image"]
    assert [picture.tobytes() for picture in shown] == [second.image.tobytes()] * 2
    assert third.messages[1] == {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}


def test_a_conversation_is_a_question_where_it_begins_with_one_about_its_own_picture(tmp_path: Path):
    def said(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
        return [{"role": role, "content": content} for role, content in turns]

    shown = [{"type": "image"}, {"type": "text", "text": "what is\n it?"}]
    other = [{"type": "image", "image": "b.png"}, {"type": "text", "text": "and it?"}]
    cases: list[tuple[list[dict[str, Any]], list[tuple[str, list[str]]]]] = [
        (said(("system", "be short"), ("user", shown), ("assistant", "a cat"), ("user", "sure?"), ("assistant", "yes")),
         [("what is it?", ["a cat"])]),
        (said(("user", other), ("assistant", "a dog")), []),  # about another picture
        (said(("user", [{"type": "image"}]), ("assistant", "a dog")), []),  # nothing is asked
        (said(("assistant", "hello"), ("user", shown)), []),
        (said(("user", shown)), []),
    ]
    rows = [{"file_name": "a.png", "messages": messages} for messages, _ in cases]
    found = open_pairs(folder(tmp_path / "said", [*rows, {"file_name": "b.png", "text": "b"}]))
    assert found.problems == [] and [row.questions for row in found.rows] == [*(asked for _, asked in cases), []]
    both = {"file_name": "a.png", "question": "what is it?", "answers": ["a cat"], "messages": cases[0][0]}
    assert open_pairs(folder(tmp_path / "both", [both])).rows[0].questions == cases[0][1]


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("9.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)


def test_a_tar(tmp_path: Path):
    write_tar(tmp_path / "pictures-000.tar", {
        "a/1.png": png(1), "a/1.txt": b"one\nanother one\n",
        "a/2.jpg": png(2), "a/2.json": json.dumps({"text": "two", "question": "q", "answers": ["a"]}).encode(),
        "a/2.mask.png": png(3, mode="L"),
        "a/3.png": png(4)[:-30], "a/3.txt": b"cut",
        "a/4.txt": b"no picture",
        "a/5.png": png(5), "a/5.json": b"[1]",
    })  # fmt: skip
    data = open_pairs(tmp_path)
    assert [(pair.texts, pair.questions, pair.mask is not None) for pair in data] == [
        (["one", "another one"], [], False), (["two"], [("q", ["a"])], True),
    ]  # fmt: skip
    assert np.array_equal(np.asarray(data[0].image), np.asarray(Image.open(io.BytesIO(png(1)))))
    told = {problem.where: problem.reason for problem in data.problems}
    assert sorted(told) == ["pictures-000.tar/9.png", "pictures-000.tar/a/3", "pictures-000.tar/a/4",
                            "pictures-000.tar/a/5.json"]  # fmt: skip
    assert "link" in told["pictures-000.tar/9.png"]
    whole = (tmp_path / "pictures-000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:2300])
    assert len(open_pairs(tmp_path / "cut.tar").problems) >= 1


def test_parquet_and_saved_data_sets(tmp_path: Path):
    import datasets

    pictures = [{"bytes": png(n), "path": None} for n in range(5)]
    pictures[3] = {"bytes": None, "path": "../outside.png"}
    pictures[4] = {"bytes": None, "path": str(tmp_path / "outside.png")}
    (tmp_path / "outside.png").write_bytes(png(9))
    columns = {
        "image": pictures, "text": ["a", "b", None, "d", "e"],
        "question": [None, "q", "q", None, None], "answers": [None, ["x"], ["y"], None, None],
    }  # fmt: skip
    features = datasets.Features({
        "image": datasets.Image(), "text": datasets.Value("string"), "question": datasets.Value("string"),
        "answers": datasets.List(datasets.Value("string")),
    })  # fmt: skip
    made = datasets.Dataset.from_dict(columns, features=features)
    (tmp_path / "parquet").mkdir()
    made.to_parquet(tmp_path / "parquet" / "train-00000-of-00001.parquet", batch_size=2)
    made.select([0]).to_parquet(tmp_path / "parquet" / "test-00000-of-00001.parquet")
    whole = made.select([0, 1, 2])
    whole.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": whole, "test": whole.select([1])}).save_to_disk(tmp_path / "splits")
    for name in ("parquet", "saved", "splits"):
        data = open_pairs(tmp_path / name)
        assert [(pair.texts, pair.questions) for pair in data] == [
            (["a"], []), (["b"], [("q", ["x"])]), ([], [("q", ["y"])]),
        ]  # fmt: skip
        expected = [True, True] if name == "parquet" else []
        assert ["leads outside" in problem.reason for problem in data.problems] == expected
        assert np.array_equal(np.asarray(data[1].image), np.asarray(Image.open(io.BytesIO(png(1)))))
    assert [len(open_pairs(tmp_path / name, split="test")) for name in ("parquet", "splits")] == [1, 1]
    with pytest.raises(InputError, match="no split 'validation'"):
        open_pairs(tmp_path / "parquet", split="validation")
    state = tmp_path / "saved" / "state.json"
    state.write_text(state.read_text().replace("data-00000", "../splits/train/data-00000"))
    with pytest.raises(InputError, match="leads outside"):
        open_pairs(tmp_path / "saved")


def test_a_folder_called_train_is_a_split_only_where_all_are(tmp_path: Path):
    folder(tmp_path / "train", [{"file_name": "a.png", "text": "an engine"}])
    folder(tmp_path / "val", [{"file_name": "b.png", "text": "another"}])
    assert [len(open_pairs(tmp_path, split=split)) for split in ("train", "validation")] == [1, 1]
    folder(tmp_path / "car", [{"file_name": "c.png", "text": "a car"}])
    data = open_pairs(tmp_path)
    assert [row.key for row in data.rows] == ["car/c.png", "train/a.png", "val/b.png"]


def test_what_is_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match="has no pictures and no metadata"):
        open_pairs(tmp_path / "nothing")
    with pytest.raises(InputError, match="There is no data at"):
        open_pairs(tmp_path / "missing")
    with pytest.raises(InputError, match=r"no folder or file here.*connection"):  # offline, as all tests are
        open_pairs("nobody/has-this-data-set")
    for mistyped in ("photoz", "./photoz", f"{tmp_path.name}/photoz", "a/b/c", "a b/c"):  # none is asked for on the net
        with monkeypatch.context() as there, pytest.raises(InputError, match="There is no data at"):
            there.chdir(tmp_path.parent)
            open_pairs(mistyped)
    (tmp_path / "photos.zip").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"is no data, expected a folder or a \.jsonl"):
        open_pairs(tmp_path / "photos.zip")
    with pytest.raises(InputError, match="no split 'test'"):
        open_pairs(folder(tmp_path / "plain", [{"file_name": "a.png", "text": "a"}]), split="test")


def test_pictures_without_words(tmp_path: Path):
    path = folder(tmp_path / "some", [{"file_name": "a.png", "text": "a"}])
    (path / "b.png").write_bytes(png(77))
    assert [row.key for row in open_pictures(path).rows] == ["a.png", "b.png"]
    (path / "metadata.jsonl").unlink()
    assert [row.key for row in open_pictures(path).rows] == ["a.png", "b.png"]
    assert len(open_pairs(path)) == 0


def test_held_out_pictures_never_straddle(tmp_path: Path):
    rows = [{"file_name": f"{n}.png", "text": f"number {n}"} for n in range(20)]
    path = folder(tmp_path / "data", rows)
    for n in range(10):  # the first ten twice, the second time under another name
        (path / f"copy-{n}.png").write_bytes((path / f"{n}.png").read_bytes())
        rows.append({"file_name": f"copy-{n}.png", "text": f"again {n}"})
    data = open_pairs(folder(path, rows))
    train, held_out = split_pairs(data, held_out_share=0.3, seed=0)
    assert len(set(held_out.hashes)) == 6 and not set(train.hashes) & set(held_out.hashes)
    assert len(train) + len(held_out) == 30
    again = split_pairs(data.subset(list(range(29, -1, -1))), held_out_share=0.3, seed=0)[1]
    assert set(again.hashes) == set(held_out.hashes)  # whatever the order
    assert set(split_pairs(data, held_out_share=0.3, seed=1)[1].hashes) != set(held_out.hashes)
    fewer = split_pairs(data.subset(list(range(19))), held_out_share=0.3, seed=0)[1]
    assert len(set(fewer.hashes) ^ set(held_out.hashes)) <= 2
    assert len(split_pairs(data, held_out_share=0, seed=0)[1]) == 0
    with pytest.raises(InputError, match="held_out_share is 1"):
        split_pairs(data, held_out_share=1, seed=0)


def test_one_more_picture_encodes_one_picture(tmp_path: Path):
    rows: list[dict[str, Any]] = [{"file_name": f"{n}.png", "text": f"number {n}"} for n in range(5)]
    rows[4]["source_file_name"] = "0.png"
    encoded: list[int] = []

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        assert pixels.shape[1:] == (3, 8, 8) and float(pixels.abs().max()) <= 1
        encoded.append(len(pixels))
        return (pixels.mean((1, 2, 3)) * 1000).long().view(-1, 1, 1).expand(-1, 2, 2)

    def pool(tokenizer: str = "one", resolution: int = 8) -> Any:
        data = open_pairs(folder(tmp_path / "data", rows))
        return coded_pairs(data, encode, resolution=resolution, cache=tmp_path / "cache", tokenizer_hash=tokenizer)

    first = pool()
    assert encoded == [5] and first.codes.shape == (5, 2, 2) and first.codes.dtype == torch.int32
    assert first.kinds == ["pair"] * 4 + ["edit"] and torch.equal(first.sources[4], first.codes[0])
    rows.append({"file_name": "new.png", "text": "new"})
    assert torch.equal(pool().codes[:5], first.codes) and encoded == [5, 1]
    (tmp_path / "data" / "3.png").rename(tmp_path / "data" / "other name.png")
    rows[3]["file_name"] = "other name.png"
    pool()
    assert encoded == [5, 1]
    pool(tokenizer="another")
    assert encoded == [5, 1, 6]


# ---------------------------------------------------------------------------------------------- shards

WRITER = """
import sys
from pathlib import Path
from mmdlm.data.shards import open_shards, write_shard
out, worker = Path(sys.argv[1]), int(sys.argv[2])
done = open_shards(out, {"size": 4})
print(len(done), flush=True)
todo = [n for n in range(60) if f"{n}" not in done]
for start in range(0, len(todo), 5):
    part = todo[start : start + 5]
    write_shard(out, [{"key": f"{n}", "by": worker} for n in part])
    print(start, flush=True)
"""


def test_shards_of_killed_and_concurrent_writers_are_whole_and_each_key_is_read_once(tmp_path: Path):
    out = tmp_path / "out"
    for _ in range(2):  # killed after some shards, in the middle of whatever it does then
        with subprocess.Popen([sys.executable, "-c", WRITER, str(out), "0"], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for _line in range(4):
                process.stdout.readline()
            process.kill()
    done = done_keys(out)
    assert 30 <= len(done) < 60
    (out / f".writing-{os.uname().nodename}-4194304-0").mkdir()  # as a killed process leaves it; no pid is so large
    both = [subprocess.Popen([sys.executable, "-c", WRITER, str(out), str(n)], stdout=subprocess.PIPE) for n in (1, 2)]
    assert [process.communicate()[0] != b"" and process.returncode for process in both] == [0, 0]
    assert not list(out.glob(".writing-*-4194304-*"))
    assert sorted(int(row["key"]) for shard in read_shards(out) for row in shard.rows) == list(range(60))
    with pytest.raises(InputError, match="another size"):
        open_shards(out, {"size": 8})
    with pytest.raises(InputError, match="other files"):
        open_shards(tmp_path, {"size": 8})


def test_the_same_keys_give_one_shard(tmp_path: Path):
    open_shards(tmp_path / "out", {})
    rows = [{"key": "a", "text": "ä"}, {"key": "b"}]
    first = write_shard(tmp_path / "out", rows, {"codes": torch.zeros(2, 3)})
    assert write_shard(tmp_path / "out", rows, {"codes": torch.ones(2, 3)}) == first
    assert float(load_file(first / "tensors.safetensors")["codes"].sum()) == 0 and len(shards(tmp_path / "out")) == 1
    write_shard(tmp_path / "out", [{"key": "b"}, {"key": "c"}])
    assert sorted(row["key"] for shard in read_shards(tmp_path / "out") for row in shard.rows) == ["a", "b", "c"]
