"""A model is saved whole or not at all, whatever stands where it is saved."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from mmdlm import model_directory
from mmdlm.errors import InputError
from mmdlm.model_directory import PRESETS, check_model_directory, model_hash, whole_directory, write_presets
from mmdlm.pipelines import TextToImage


class Killed(BaseException):
    """As a kill: nothing in the library catches it."""


def files(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def pipe(tiny_model: Path) -> TextToImage:
    return TextToImage.from_pretrained(tiny_model)


def test_a_new_directory_is_there_whole_or_not_at_all(pipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "runs" / "model"
    seen = []

    def killed(directory: Path, presets: object) -> None:
        seen.append(directory)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("mmdlm.pipelines.pipeline.write_presets", killed)
        patch.setattr(model_directory.shutil, "rmtree", lambda *_, **__: None)  # a kill tidies nothing up
        with pytest.raises(Killed):
            pipe.save_pretrained(target)
    assert (seen[0] / "model" / "model.safetensors").is_file() and seen[0].name == "model" and not target.exists()
    shutil.rmtree(target.parent)
    pipe.save_pretrained(target)
    check_model_directory(target)
    assert [path.name for path in target.parent.iterdir()] == ["model"]
    usual = tmp_path / "usual"
    usual.mkdir()
    assert target.stat().st_mode == usual.stat().st_mode  # and not mkdtemp's, which is closed to others


def test_what_else_is_in_the_directory_stays(pipe, tiny_model: Path, tmp_path: Path):
    target = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    more = {"README.md", "rehearsal.jsonl", "processor/notes.txt", "own/picture.png"}
    for name in more:
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_text(name)
    (target / "model" / "model-00001-of-00002.safetensors").write_bytes(b"of a save before")
    with torch.no_grad():
        pipe.model.head.weight.add_(1.0)
    pipe.save_pretrained(target)
    assert files(target) == files(tiny_model) | more
    assert all((target / name).read_text() == name for name in more)
    again = TextToImage.from_pretrained(target)
    assert torch.equal(again.model.head.weight, pipe.model.head.weight) and model_hash(target) != model_hash(tiny_model)
    pipe.save_pretrained(target, True, "fp16")  # diffusers' arguments; a variant stands beside the weights
    assert {"model/model.safetensors", "model/model.fp16.safetensors"} <= files(target)
    with pytest.raises(InputError, match="safe_serialization is False, expected True"):
        pipe.save_pretrained(target, safe_serialization=False)
    with pytest.raises(InputError, match=r"README.md is a file, expected a directory"):
        pipe.save_pretrained(target / "README.md")


def test_a_failure_at_any_move_leaves_the_model_of_before(pipe, tiny_model: Path, tmp_path: Path, monkeypatch):
    target = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (target / PRESETS).unlink()  # one part is new
    before, old_hash = files(target), model_hash(target)
    with torch.no_grad():
        pipe.model.head.weight.add_(1.0)
    for fails_at in range(1, 12):
        moves = []

        def fails(source: Path, place: Path, moves: list[Path] = moves, fails_at: int = fails_at) -> None:
            if Path(source).parent == target or Path(place).parent == target:
                moves.append(place)
                if len(moves) == fails_at:
                    raise OSError(28, "No space left on device")
            os.rename(source, place)

        with monkeypatch.context() as patch:
            patch.setattr(model_directory.os, "replace", fails)
            try:
                pipe.save_pretrained(target)
            except OSError as error:
                assert error.errno == 28  # for disk_guard
            else:
                break
        assert files(target) == before and model_hash(target) == old_hash, fails_at
        check_model_directory(target)
    assert fails_at == 10  # four parts away, five in: the moves that can fail
    assert files(target) == files(tiny_model) and model_hash(target) != old_hash


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_kill_between_the_moves_leaves_no_model_and_saving_again_mends_it(pipe, tiny_model: Path, tmp_path: Path):
    target = tmp_path / "model"
    pipe.save_pretrained(target)

    def killed(source: Path, place: Path) -> None:
        if place == target / "model":
            os._exit(9)
        os.rename(source, place)

    child = os.fork()
    if child == 0:
        try:
            model_directory.os.replace = killed
            with whole_directory(target) as place:
                shutil.copytree(tiny_model, place)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    with pytest.raises(InputError, match=r"has no model_index\.json"):
        check_model_directory(target)
    pipe.save_pretrained(target)
    check_model_directory(target)
    assert not list(target.glob(".*"))


def test_presets_are_replaced_in_one_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_presets(tmp_path, {"draw": {"num_inference_steps": 3}})
    before = (tmp_path / PRESETS).read_text()

    def full(self: Path, *_: object, **__: object) -> int:
        self.write_bytes(b"")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space left"):
            write_presets(tmp_path, {"draw": {"num_inference_steps": 4}})
    assert files(tmp_path) == {PRESETS} and (tmp_path / PRESETS).read_text() == before


def test_a_body_that_fails_leaves_nothing(tmp_path: Path):
    with pytest.raises(Killed), whole_directory(tmp_path / "deep" / "model") as place:
        place.mkdir()
        raise Killed
    assert not list((tmp_path / "deep").iterdir())
