"""The command line on a tiny model: what it writes and prints; every mistake is one sentence and code 2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from mmdlm import __version__
from mmdlm.cli import _one_line, app
from mmdlm.model_directory import model_hash

PROMPT = "a red apple"


def mmdlm(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def good(*arguments: object) -> str:
    result = mmdlm(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def refused(*arguments: object) -> str:
    """The one sentence of a mistake."""
    result = mmdlm(*arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == "" and result.stderr.count("\n") == 1
    assert result.stderr.startswith("mmdlm: ") and "Traceback" not in result.stderr
    return result.stderr


@pytest.fixture
def options(tiny_model: Path) -> tuple[object, ...]:
    return ("--model", tiny_model, "--device", "cpu", "--steps", "3")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "seen.png"
    Image.radial_gradient("L").resize((40, 30)).save(path)
    return path


# ------------------------------------------------------------------------------------------------ generate


def test_a_picture_that_carries_where_it_came_from(tiny_model, options, tmp_path):
    out = tmp_path / "apple.png"
    printed = good("generate", PROMPT, "-o", out, "--seed", 7, "--guidance", 1.5, *options)
    assert printed == f"{out} (seed 7)\n"
    with Image.open(out) as written:
        assert written.size == (16, 16)
        assert written.text == {
            "prompt": PROMPT,
            "seed": "7",
            "steps": "3",
            "guidance_scale": "1.5",
            "model_hash": model_hash(tiny_model),
            "mmdlm_version": __version__,
        }
    assert list(tmp_path.iterdir()) == [out]


def test_the_same_seed_writes_the_same_bytes(options, tmp_path):
    contents = []
    for name, seed in (("a.png", 3), ("b.png", 3), ("c.png", 4)):
        good("generate", PROMPT, "-o", tmp_path / name, "--gif", tmp_path / "a.gif", "--seed", seed, *options)
        contents.append(((tmp_path / name).read_bytes(), (tmp_path / "a.gif").read_bytes()))
    assert contents[0] == contents[1]
    assert contents[0][0] != contents[2][0] and contents[0][1] != contents[2][1]


def test_without_a_seed_a_new_one_is_printed_and_recorded(options, tmp_path):
    seeds = set()
    for _ in range(2):
        printed = good("generate", PROMPT, "-o", tmp_path / "a.png", *options)
        with Image.open(tmp_path / "a.png") as written:
            assert f"(seed {written.text['seed']})" in printed
            seeds.add(written.text["seed"])
    assert len(seeds) == 2


def test_several_pictures_are_numbered_and_each_can_be_drawn_again_alone(options, tmp_path):
    good("generate", PROMPT, "日本 🍎", "-n", 2, "-o", tmp_path / "p.png", "--seed", 10, *options)
    names = [f"p-{index}.png" for index in range(4)]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    facts = []
    for name in names:
        with Image.open(tmp_path / name) as written:
            facts.append((written.text["prompt"], written.text["seed"]))
    assert facts == [(PROMPT, "10"), (PROMPT, "11"), ("日本 🍎", "12"), ("日本 🍎", "13")]
    good("generate", "日本 🍎", "-o", tmp_path / "again.png", "--seed", 13, *options)
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "p-3.png").read_bytes()


def test_more_pictures_than_are_drawn_at_once(options, tmp_path):
    good("generate", PROMPT, "-n", 11, "-o", tmp_path / "p.png", "--gif", tmp_path / "p.gif", "--seed", 0, *options)
    assert sorted(tmp_path.glob("*.png"))[-1].name == "p-10.png"
    good("generate", PROMPT, "-o", tmp_path / "last.png", "--seed", 10, *options)
    assert (tmp_path / "last.png").read_bytes() == (tmp_path / "p-10.png").read_bytes()


def test_a_sheet_has_a_row_for_each_prompt(options, tmp_path):
    good("generate", PROMPT, "two stars", "-n", 3, "--grid", "-o", tmp_path / "s.png", "--seed", 1, *options)
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.size == (3 * 18 - 2, 2 * 18 - 2)
        assert (sheet.text["prompt"], sheet.text["seed"], sheet.text["pictures"]) == (f"{PROMPT}\ntwo stars", "1", "6")
        good("generate", "two stars", "-o", tmp_path / "one.png", "--seed", 6, *options)
        with Image.open(tmp_path / "one.png") as last:
            assert sheet.crop((36, 18, 52, 34)).tobytes() == last.tobytes()
    good("generate", PROMPT, "-n", 4, "--grid", "-o", tmp_path / "s.png", "--seed", 1, *options)
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.size == (34, 34)


def test_an_animation_has_a_frame_for_each_step(options, tmp_path):
    good("generate", PROMPT, "-n", 2, "-o", tmp_path / "p.png", "--gif", tmp_path / "p.gif", "--seed", 1, *options)
    with Image.open(tmp_path / "p.gif") as film:
        assert (film.n_frames, film.size) == (3, (34, 16))


# ------------------------------------------------------------------------------------------------ caption, ask


def test_captions_and_answers(options, picture):
    one = good("caption", picture, *options)
    two = good("caption", picture, picture, *options)
    assert two == f"{picture}\t{one}" * 2
    assert good("ask", picture, "what colour is it?", *options).count("\n") == 1


# ------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("prompt", "words"), [("", "prompt is empty"), (" \n", "prompt is empty"), ("word " * 400, "too long by")]
)
def test_a_bad_prompt(options, tmp_path, prompt, words):
    assert words in refused("generate", prompt, "-o", tmp_path / "a.png", *options)
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_cannot_be_read(options, tmp_path, picture):
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:200])
    (tmp_path / "empty.png").write_bytes(b"")
    mistakes = {"cut.png": "broken or cut short", "empty.png": "is empty", "x" * 300: "no picture at"}
    for name, words in mistakes.items():
        assert words in refused("caption", picture, tmp_path / name, *options)
        assert words in refused("ask", tmp_path / name, "what is it?", *options)
    assert "question is empty" in refused("ask", picture, "", *options)


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    # no --model: were the place not the first thing looked at, this would load a model
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for place, words in (
        (tmp_path / "no" / "a.png", "no directory"),
        (tmp_path / "file" / "a.png", "no directory"),
        (tmp_path / "folder.png", "is a directory"),
        (tmp_path / "a.jpg", "ending in .png"),
        (tmp_path / ("x" * 300 + ".png"), "cannot be written (File name too long)"),
        ("/proc/a.png", "cannot be written"),
    ):
        assert words in refused("generate", PROMPT, "-o", place)
    assert "ending in .gif" in refused("generate", PROMPT, "-o", tmp_path / "a.png", "--gif", tmp_path / "b.png")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder.png"}


def test_a_directory_that_is_no_model(tmp_path, tiny_model):
    out = ("-o", tmp_path / "a.png")
    assert "no model directory" in refused("generate", PROMPT, *out, "--model", tmp_path / "none")
    assert "has no model_index.json" in refused("generate", PROMPT, *out, "--model", tmp_path)
    assert "no model directory" in refused("generate", PROMPT, *out, "--model", tiny_model / "model_index.json")
    assert "no model directory" in refused("generate", PROMPT, *out, "--model", "x" * 300)


@pytest.mark.parametrize("device", ["nonsense", "meta", "cuda:99", "hpu", "privateuseone"])
def test_a_device_that_is_not_there(tmp_path, tiny_model, device):
    words = refused("generate", PROMPT, "-o", tmp_path / "a.png", "--model", tiny_model, "--device", device)
    assert "--device cpu" in words or "use cpu" in words
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [("--steps", "0"), ("--guidance", "nan"), ("--guidance", "-1")])
def test_a_setting_out_of_range(tmp_path, tiny_model, wrong):
    refused("generate", PROMPT, "-o", tmp_path / "a.png", "--model", tiny_model, *wrong)


@pytest.mark.parametrize("wrong", [("-n", "0"), ("--seed", "-1"), ("--seed", str(2**63)), ("--nonsense",)])
def test_a_wrong_option_is_a_usage_error(wrong):
    assert mmdlm("generate", PROMPT, *wrong).exit_code == 2


@pytest.mark.parametrize(
    "command",
    [("caption", "x.png"), ("score", "x.png", "a cat"), ("bench",), ("tune",), ("finetune", "data", "--out", "run"),
     ("eval", "likelihood", "data", "-o", "run")],
)  # fmt: skip
def test_a_seed_that_is_too_large_is_a_usage_error(command):
    done = mmdlm(*command, "--seed", 2**64)
    assert done.exit_code == 2 and "--seed" in done.output, done.output


def test_material_that_is_not_there_and_a_place_that_is_none(tmp_path):
    assert "tools/fetch_pictures.sh" in refused("data", "build", "pictures", tmp_path / "out", "--source", tmp_path)
    (tmp_path / "file").write_text("")
    assert "is no directory" in refused("data", "build", "pictures", tmp_path / "file" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("content", ["{}", "[]", '{"model": {"vocab": {"a": 0}}}', '{"model": {"voc', None])
def test_a_broken_text_tokenizer_is_one_sentence_to_validate(tmp_path, content, picture):
    (tmp_path / "processor").mkdir()
    if content is not None:
        (tmp_path / "processor" / "tokenizer.json").write_text(content)
    assert "tokenizer" in refused("data", "validate", picture.parent, "--model", tmp_path)


def test_text_of_a_model_never_steers_the_terminal():
    assert _one_line("a red\n apple\x1b[2J\x07") == "a red apple\ufffd[2J\ufffd"


def test_what_stood_there_stays_when_the_work_fails(options, tmp_path):
    old = tmp_path / "a.png"
    old.write_bytes(b"old")
    refused("generate", "", "-o", old, *options)
    assert old.read_bytes() == b"old" and list(tmp_path.iterdir()) == [old]


def test_a_program_that_is_not_there():
    assert "no program" in refused("path", "train/nonsense")
    assert "no program" in refused("run", "nonsense", "--help")


# ------------------------------------------------------------------------------------------------ the real process


def process(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from mmdlm.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)


def test_help_starts_fast_and_loads_nothing_heavy():
    for command in (["--help"], ["generate", "--help"]):
        spent = -sum(os.times()[2:4])  # of children: a busy machine stretches the time by the clock, not this
        assert "generate" in process(*command).stdout
        assert spent + sum(os.times()[2:4]) < 1, command
    loaded = "import sys, mmdlm.cli; print({'torch', 'transformers', 'diffusers', 'numpy', 'PIL'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", loaded], text=True) == "set()\n"
    assert good("--version") == f"{__version__}\n"


def test_a_quiet_pipe_gets_nothing_but_the_answer(tmp_path, options):
    done = process("generate", PROMPT, "-o", tmp_path / "a.png", "--seed", 1, *options)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path / 'a.png'} (seed 1)\n", "")
    wrong = process("generate", "\udcff", "-o", tmp_path / "b.png", *options)
    assert wrong.returncode == 2 and wrong.stdout == "" and wrong.stderr.count("\n") == 1
    assert "not valid UTF-8" in wrong.stderr


def test_a_bug_keeps_its_traceback(tmp_path, tiny_model):
    code = (
        "import mmdlm.processing\n"
        "del mmdlm.processing.MMDLMProcessor.text_ids\n"
        "from mmdlm.cli import main\nmain()"
    )
    command = [sys.executable, "-c", code, "generate", PROMPT, "-o", tmp_path / "a.png", "--model", tiny_model]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" in done.stderr and "AttributeError" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_programs_are_listed_found_and_run_with_their_arguments():
    from mmdlm.programs import list_programs

    listed = good("ls")
    assert all(f"  {program}\n" in listed for program in list_programs())
    path = Path(good("path", "tokenizers/train_lfq").strip())
    assert path.name == "train_lfq.py" and path.is_file()
    done = process("run", "tokenizers/train_lfq", "nosuchsetting=1")
    assert done.returncode != 0 and "nosuchsetting" in done.stderr
