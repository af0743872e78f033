"""`mmdlm finetune` and `mmdlm merge` through the real command line: to the end, on again, merged, and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner, Result

from mmdlm.assets import shipped_model
from mmdlm.cli import app
from mmdlm.cli.finetune import KEPT, as_written, default_learning_rate, default_steps, spelled_words, words_to_add
from mmdlm.data.paired import open_pairs, split_pairs
from mmdlm.errors import InputError
from mmdlm.models.new_words import processor_with
from mmdlm.pipelines import TextToImage
from mmdlm.processing import MMDLMProcessor
from mmdlm.sequence import batch, draw_canvas, hide

STEPS = 3
STICKERS = Path(__file__).parents[2] / "examples" / "stickers"


def mmdlm(*words: str | Path | float) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def pictures(folder: Path, colours: dict[str, str]) -> Path:
    folder.mkdir()
    lines = []
    for number, (colour, caption) in enumerate(colours.items()):
        Image.new("RGB", (40, 30), colour).save(folder / f"{number}.png")
        lines.append({"file_name": f"{number}.png", "text": caption, "question": "what is this?", "answers": [colour]})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


FOUR = {"red": "a red wall", "blue": "a blue wall", "green": "a green wall", "black": "a black wall"}


@pytest.fixture(scope="module")
def words(tiny_model) -> list[str | Path | int]:
    return ["--max_train_steps", STEPS, "--train-batch-size", 2, "--rehearse", 0, "--rank", 2, "--model", tiny_model,
            "--device", "cpu", "--new-word", "wall", "report_to=none", "validation_scenes=4"]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory, words) -> tuple[Path, Path, Result]:
    """(pictures, run directory, result) of three steps on a tiny model."""
    place = tmp_path_factory.mktemp("finetune")
    data = pictures(place / "walls", FOUR)
    return data, place / "run", mmdlm("finetune", data, *words, "--out", place / "run")


def test_it_ends_with_an_adapter_and_says_before_and_after(run, tiny_model, tmp_path):
    data, out, result = run
    assert result.exit_code == 0, result.output
    assert "4 pictures in" in result.output and "3 to train on, 1 held out" in result.output
    assert "memory on cpu" in result.output
    assert "held out, 1 of 1 pictures" in result.output and "image, nats per code (bound)" in result.output
    results = json.loads((out / "results.json").read_text())
    assert results["trained on"]["before"] != results["trained on"]["after"]
    assert {"adapter", "before", "after", "report.html", "before-after-held-out.png"} <= {
        path.name for path in out.iterdir()
    }
    with Image.open(out / "before" / "held-out" / "0000.png") as first, Image.open(
        out / "after" / "held-out" / "0000.png"
    ) as then:
        assert first.text["prompt"] in FOUR.values() and first.text["model_hash"] == then.text["model_hash"]
        assert "adapter_hash" not in first.text and len(then.text["adapter_hash"]) == 16
        assert {"seed", "mmdlm_version"} <= set(first.text)
        facts = {key: then.text[key] for key in ("model_hash", "adapter_hash", "mmdlm_version")}
    with Image.open(out / "before-after-held-out.png") as sheet:
        assert sheet.text == facts
    given = ["--adapter", out, "--model", tiny_model, "-q"]
    drawn = mmdlm("generate", "a red wall", "--seed", 1, "-o", tmp_path / "one.png", *given)
    assert drawn.exit_code == 0, drawn.output
    with Image.open(tmp_path / "one.png") as picture:
        assert len(picture.info["adapter_hash"]) == 16
    assert mmdlm("caption", data / "0.png", *given).exit_code == 0


def test_the_same_command_goes_on_and_another_is_refused(run, words):
    data, out, _ = run
    before = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    (out / "results.json").unlink()
    again = mmdlm("finetune", data, *words, "--out", out)
    assert again.exit_code == 0, again.output
    assert "measuring" not in again.output  # nothing that is there is made again
    assert (out / "results.json").is_file()
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == before
    other = mmdlm("finetune", data, *words, "--out", out, "--seed", 5)
    assert other.exit_code == 2 and "holds a run with other settings" in other.output


def test_merged_it_says_the_same_and_the_adapter_is_refused_on_it(run, tiny_model, tmp_path):
    _, out, _ = run
    result = mmdlm("merge", out, "-o", tmp_path / "merged", "--model", tiny_model)
    assert result.exit_code == 0, result.output
    adapted = TextToImage.from_pretrained(tiny_model, adapter=out)
    merged = TextToImage.from_pretrained(tmp_path / "merged")
    assert merged.presets == adapted.presets
    assert merged.processor.text_ids("a wall")[-1] == adapted.processor.vocabulary.text_size - 1  # its own id
    one, other = (logits(pipe) for pipe in (adapted, merged))
    assert (one - other).abs().max() < 1e-5 * one.abs().max()
    assert one.shape[-1] == logits(TextToImage.from_pretrained(tiny_model)).shape[-1] + 1
    again = mmdlm("merge", out, "-o", tmp_path / "merged", "--model", tiny_model)
    assert again.exit_code == 2 and "is there already" in again.output
    with pytest.raises(InputError, match="An adapter is in the model"):
        adapted.save_pretrained(tmp_path / "half")
    drawn = mmdlm("generate", "x", "--adapter", out, "--model", tmp_path / "merged", "-o", tmp_path / "x.png")
    assert drawn.exit_code == 2 and "belongs to the model" in drawn.output
    missing = mmdlm("generate", "x", "--adapter", tmp_path / "nowhere", "-o", tmp_path / "x.png")
    assert missing.exit_code == 2 and "no adapter at" in missing.output


def logits(pipe: TextToImage) -> torch.Tensor:
    words = pipe.processor.vocabulary
    row = hide(draw_canvas(pipe.processor.text_ids("a red wall"), None, pipe.grid, words), words.mask_id)
    canvas, _ = batch([row], pad_id=words.pad_id)
    with torch.no_grad():
        return pipe.model(canvas.ids, position_ids=canvas.positions, grid=canvas.grid).logits


def test_words_that_have_to_be_written_and_are_spelled_get_ids_of_their_own():
    processor = TextToImage.from_pretrained().processor
    train, _ = split_pairs(open_pairs(STICKERS), held_out_share=0.125, seed=0)
    # "alligator" and "spiny" are spelled too, and stand in prompts only.
    assert set(words_to_add(train, processor)) == {
        "anchor", "crab", "crocodile", "hedgehog", "jellyfish", "kangaroo", "parrot", "planet", "popcorn", "squirrel",
        "taco", "teddy",
    }  # fmt: skip
    assert words_to_add(train, processor_with(processor, [" crab", " taco"])) == [
        word for word in words_to_add(train, processor) if word not in ("crab", "taco")
    ]


@pytest.mark.parametrize("kind", ["adapter", "pipeline"])
def test_what_is_replayed_is_kept_and_not_learned(kind: str, words, tiny_model, tmp_path):
    data, known = pictures(tmp_path / "walls", FOUR), pictures(tmp_path / "known", dict(list(FOUR.items())[:3]))
    given = [*words, "--replay", known, "--out", tmp_path / "run", *(["--full"] if kind == "pipeline" else [])]
    result = mmdlm("finetune", data, *given)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run" / kind).is_dir()
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert [(Path(source["path"]).name, source["weight"], source["keep"]) for source in settings["data"]] == [
        ("walls", 1.0, False), ("known", KEPT, True),
    ]  # fmt: skip
    if kind == "pipeline":  # with a word of its own, and the old words trained beside it
        trained = TextToImage.from_pretrained(tmp_path / "run" / "pipeline")
        before = TextToImage.from_pretrained(tiny_model).model.get_input_embeddings().weight
        after = trained.model.get_input_embeddings().weight
        assert len(after) == len(before) + 1 and not torch.equal(after[: len(before) // 2], before[: len(before) // 2])


def test_mistakes_are_one_sentence_before_anything_is_made(tmp_path):
    data, out = pictures(tmp_path / "walls", FOUR), tmp_path / "run"
    (tmp_path / "empty").mkdir()
    unknown = pictures(tmp_path / "unknown", FOUR)
    rows = (unknown / "metadata.jsonl").read_text().replace('"text"', '"words"').replace('"question"', '"ask"')
    (unknown / "metadata.jsonl").write_text(rows.replace('"answers"', '"say"'))
    for words, said in (
        ([tmp_path / "empty"], "no picture"),
        ([tmp_path / "nowhere"], "nowhere"),
        ([unknown], "words"),
        ([data, "--train_batch_size", 100_000_000], "are free on cpu: lower --train-batch-size"),
        ([data, "--held-out-share", 1], "--held-out-share is 1.0"),
        ([data, "--mixed-precision", "int8"], "expected no, bf16 or fp16"),
        ([data, "rank"], "expected KEY=VALUE"),
        ([data, "--rehearse", 1], "expected 0 or at least 2"),
    ):
        result = mmdlm("finetune", *words, "--out", out)
        assert result.exit_code == 2 and said in result.output, (said, result.output)
        assert not out.exists()


def test_the_learning_rate_falls_with_the_width(tiny_model):
    assert default_learning_rate(shipped_model(), full=False) == 3e-3
    assert default_learning_rate(shipped_model(), full=True) == 4e-4
    assert default_learning_rate(tiny_model, full=True) == 2.4e-3  # of width 32


def test_steps_follow_the_number_of_pictures():
    assert default_steps(1, 8) == default_steps(8, 8) == 750
    assert default_steps(24, 8) == 2100
    assert default_steps(24, 16) == 1050
    assert default_steps(1_000_000, 8) == 125_000


def test_words_that_the_model_spells_are_named():
    texts = ["a fox", "a fox on red", "a panda", "an ox", "an ox", "zebras", "zebras"]
    assert spelled_words(texts, lambda text: list(range(len(text) // 2))) == ["fox", "zebras"]
    assert spelled_words(texts, lambda text: [0]) == []


def test_words_get_the_form_in_which_the_data_has_them(tmp_path: Path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    row = {"file_name": "a.png", "text": ["popcorn in a box", "a box of popcorn"], "question": "Is it a taco-shell?"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row | {"answers": ["no, corn"]}) + "\n")
    data = open_pairs(str(tmp_path))
    words = ["popcorn", "box", "taco", "corn", "shell", "absent"]
    forms = as_written(words, data)
    assert forms == [" popcorn", "popcorn", " box", " taco", " corn", "shell", " absent"]
    processor = MMDLMProcessor.from_pretrained(shipped_model() / "processor")
    grown = processor_with(processor, [" popcorn", "popcorn", " taco"])
    for text, tokens in (("popcorn", 1), ("a popcorn", 2), ("a popcorn taco", 3)):
        ids = grown.text_ids(text)
        assert len(ids) == tokens and grown.tokenizer.decode(ids) == text

