"""`mmdlm fill`, `mmdlm score`, and what generate and caption offer to watch and to choose: files, lines, mistakes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from mmdlm.cli import app
from mmdlm.picture_files import heat_map

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
    Image.radial_gradient("L").resize((16, 16)).convert("RGB").save(path)
    return path


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    path = tmp_path / "mask.png"
    half = Image.new("L", (16, 16), 0)
    half.paste(255, (8, 0, 16, 16))
    half.save(path)
    return path


def test_a_part_of_a_picture(options, picture, mask, tmp_path):
    out, maps, frames = tmp_path / "out.png", tmp_path / "sure.png", tmp_path / "frames"
    printed = good("fill", "--image", picture, "--mask", mask, "--text", PROMPT, "--keep-pixels", "-o", out,
                   "--seed", 4, "--gif", tmp_path / "film.gif", "--frames", frames, "--confidence", maps, *options)
    assert printed.splitlines() == [PROMPT, str(out), str(tmp_path / "film.gif"), str(maps)]
    with Image.open(out) as filled, Image.open(picture) as before, Image.open(maps) as sure:
        assert filled.crop((0, 0, 8, 16)).tobytes() == before.crop((0, 0, 8, 16)).tobytes()
        assert filled.text["text"] == PROMPT and filled.text["seed"] == "4" and filled.text["steps"] == "3"
        assert sure.size == (16, 16) and (np.asarray(sure)[:, :8] == 255).all()
        assert (np.asarray(sure)[:, 8:].min(axis=(0, 2)) < 255).all()
    assert sorted(path.name for path in frames.iterdir()) == ["step-0.png", "step-1.png", "step-2.png"]
    with Image.open(tmp_path / "film.gif") as film:
        assert film.n_frames >= 1 and film.size == (16, 16)


@pytest.mark.parametrize("command", ["fill", "generate"])
@pytest.mark.parametrize("count", [1, 2])
def test_what_is_watched_says_where_it_came_from_as_the_picture_does(options, tmp_path, command, count):
    out, maps, frames = tmp_path / "out.png", tmp_path / "sure.png", tmp_path / "frames"
    said = ("fill", "--text", PROMPT, "--variations") if command == "fill" else ("generate", PROMPT, "-n")
    good(*said, count, "--grid", "-o", out, "--seed", 4, "--frames", frames, "--confidence", maps, *options)
    told = read_text(out)
    assert {"seed", "steps", "model_hash", "mmdlm_version"} <= set(told) and PROMPT in told.values()
    assert told["seed"] == "4" and told.get("pictures", "1") == str(count)
    shown = read_text(maps)
    assert shown.pop("about").startswith("probability") and shown == told
    for step in range(3):
        assert read_text(frames / f"step-{step}.png") == told | {"step": str(step)}
    # several pictures, each in its own file: what is watched is of all of them
    if count > 1:
        good(*said, count, "-o", out, "--seed", 4, "--confidence", maps, *options)
        assert {key: value for key, value in read_text(maps).items() if key != "about"} == told


def read_text(path: Path) -> dict[str, str]:
    with Image.open(path) as picture:
        return dict(picture.text)


@pytest.mark.parametrize("command", ["fill", "generate"])
def test_two_outputs_of_one_name_are_refused(options, tmp_path, command):
    (tmp_path / "frames").mkdir()
    said = ("fill", "--text", PROMPT) if command == "fill" else ("generate", PROMPT)
    many = "--variations" if command == "fill" else "-n"
    out, same, film = tmp_path / "a.png", tmp_path / "frames" / ".." / "a.png", tmp_path / "a.gif"
    for arguments, words in [
        (("-o", out, "--confidence", out), "-o and --confidence both write"),
        (("-o", out, "--confidence", same), "-o and --confidence both write"),
        (("-o", out, many, 2, "--confidence", tmp_path / "a-1.png"), "-o and --confidence both write"),
        (("-o", out, "--frames", out), "-o and --frames both write"),
        (("-o", out, "--gif", film, "--frames", film), "--gif and --frames both write"),
        (("-o", tmp_path / "frames" / "step-0.png", "--frames", tmp_path / "frames"), "-o and --frames both write"),
        (("-o", out, "--confidence", tmp_path / "frames" / "step-03.png", "--frames", tmp_path / "frames"),
         "--confidence and --frames both write"),
    ]:
        assert words in refused(*said, *arguments, *options), arguments
    assert [path.name for path in tmp_path.iterdir()] == ["frames"]
    assert list((tmp_path / "frames").iterdir()) == []


def test_variations_and_the_same_seed(options, picture, tmp_path):
    vary = ("fill", "--image", picture, "--variations")
    good(*vary, 2, "--strength", 0.5, "-o", tmp_path / "v.png", "--seed", 1, *options)
    good(*vary, 1, "-o", tmp_path / "w.png", "--seed", 2, *options)
    first, second = ((tmp_path / f"v-{i}.png").read_bytes() for i in (0, 1))
    assert first != second and (tmp_path / "w.png").read_bytes() == second


def test_words_alone_write_no_file(options, picture, tmp_path):
    before = sorted(tmp_path.iterdir())
    printed = good("fill", "--text", "a [MASK:{red|blue}] apple", "--image", picture, *options)
    said, odds = printed.splitlines()
    assert said in ("a red apple", "a blue apple") and odds.startswith("  ") and odds.count("%") == 2
    assert sorted(tmp_path.iterdir()) == before
    drawn = good("fill", "--text", "a [MASK:1] apple", "-o", tmp_path / "both.png", *options)
    assert drawn.splitlines()[1].startswith(str(tmp_path / "both.png"))


@pytest.mark.parametrize("command", ["fill", "generate"])
def test_steps_are_played_back_to_the_same_bytes(options, tmp_path, command):
    steps = tmp_path / "steps.safetensors"
    said = ("fill", "--text", PROMPT) if command == "fill" else ("generate", PROMPT, "-n", 2, "--grid")
    good(*said, "-o", tmp_path / "a.png", "--gif", tmp_path / "a.gif", "--replay", steps, *options)  # a random seed
    good(*said, "-o", tmp_path / "b.png", "--gif", tmp_path / "b.gif", "--replay", steps, *options)
    for suffix in ("png", "gif"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()
    other = (*said[:-1], "a blue car") if command == "fill" else (*said, "--guidance", 3.0)
    assert "was recorded with" in refused(*other, "-o", tmp_path / "c.png", "--replay", steps, *options)


def test_the_best_of_several_can_be_drawn_again(options, tmp_path):
    good("generate", PROMPT, "--best-of", 3, "-n", 2, "--seed", 10, "-o", tmp_path / "best.png", *options)
    for index, seeds in ((0, {10, 11, 12}), (1, {13, 14, 15})):
        with Image.open(tmp_path / f"best-{index}.png") as best:
            seed, pixels = int(best.text["seed"]), best.tobytes()
        assert seed in seeds
        good("generate", PROMPT, "--seed", seed, "-o", tmp_path / "again.png", *options)
        with Image.open(tmp_path / "again.png") as again:
            assert again.tobytes() == pixels
    frames = tmp_path / "frames"
    good("generate", PROMPT, "--best-of", 2, "--frames", frames, "--confidence", tmp_path / "sure.png", "--seed", 1,
         "--policy", "{name: threshold, tau: 0.9}", "-o", tmp_path / "x.png", *options)
    assert len(list(frames.iterdir())) >= 1 and (tmp_path / "sure.png").is_file()


def test_the_best_caption_is_the_likeliest_one(options, picture):
    greedy = good("caption", picture, *options)
    best = good("caption", picture, "--best-of", 3, "--seed", 1, *options)
    assert best == good("caption", picture, "--best-of", 3, "--seed", 1, *options) and greedy


def test_scores_are_bounds_with_an_error(options, picture):
    printed = good("score", picture, "a red apple", "a blue car on a green background", "--samples", 8, *options[:4])
    head, *rows = printed.splitlines()
    assert head.startswith("text given picture\t") and len(rows) == 2
    for row, text in zip(rows, ("a red apple", "a blue car on a green background"), strict=True):
        words, drawn, said = row.split("\t")
        assert said == text
        numbers = [[float(part) for part in number.split(" +- ")] for number in (words, drawn)]
        assert all(nats > 0 and error >= 0 for nats, error in numbers)


def test_a_heat_map_by_hand():
    shown = heat_map([[0.0, 1 / 3], [2 / 3, 1.0]], 2)
    assert [shown.getpixel(at) for at in ((0, 0), (1, 0), (0, 1), (1, 1))] == [
        (0, 0, 0), (255, 0, 0), (255, 255, 0), (255, 255, 255)]


def test_every_mistake_is_one_sentence(options, picture, mask, tmp_path):
    odd = tmp_path / "odd.png"
    Image.new("L", (7, 9), 255).save(odd)
    (tmp_path / "file").write_text("x")
    out = ("-o", tmp_path / "out.png")
    seen = ("--image", picture)
    for arguments, words in [
        ((), "neither a picture nor a text"),
        ((*seen, "--mask", odd), "7 x 9 pixels, the picture 16 x 16"),
        ((*seen, "--extend", "16,0,16,0"), "48 x 16 with its extension, expected 16 x 16"),
        ((*seen, "--extend", "4,4"), "LEFT,TOP,RIGHT,BOTTOM"),
        ((*seen, "--mask", mask, "--steps", 0), "num_inference_steps is 0"),
        ((*seen, "--mask", mask, "--policy", "{name: threshold, tau: 1.5}"), "tau is 1.5"),
        ((*seen, "--mask", mask, "--policy", "treshold"), "did you mean threshold"),
        ((*seen, "--mask", mask, "--policy", "[1"), "is not understood"),
        ((*seen, "--strength", 2), "strength is 2.0"),
        (("--text", "word " * 70 + "[MASK:1]"), "text is too long by"),
        (("--text", "a [MASK:x]"), "is no hole"),
        (("--text", PROMPT), "nothing to fill"),
        (("--text", "a [MASK:1]", "--gif", tmp_path / "a.gif"), "give -o"),
        ((*seen, "--mask", mask, "--frames", tmp_path / "file"), "is a file, expected a directory"),
        ((*seen, "--mask", mask, "--replay", tmp_path / "file"), "is no recording"),
        ((*seen, "--mask", mask, "--replay", tmp_path / "steps.txt"), "ending in .safetensors"),
        ((*seen, "--mask", mask, "--confidence", tmp_path / "map.jpg"), "ending in .png"),
    ]:
        there = () if "--text" in arguments or not arguments else out
        assert words in refused("fill", *options, *arguments, *there), arguments
    assert "A text is empty" in refused("score", picture, " ", *options[:4])
    assert "got 1 samples" in refused("score", picture, PROMPT, "--samples", 1, *options[:4])
    assert "too long by" in refused("score", picture, "word " * 70, *options[:4])
    assert not (tmp_path / "out.png").exists()
