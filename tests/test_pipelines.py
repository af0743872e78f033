"""The pipelines on a tiny model of random weights: what they return, that rows are independent, and every bad input."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from mmdlm.errors import InputError
from mmdlm.model_directory import check_model_directory, model_hash
from mmdlm.pipelines import DEFAULT_PRESETS, ImageToText, TextToImage

PROMPTS = ["a red apple", "a blue car on a green background"]


@pytest.fixture(scope="module")
def draw(tiny_model: Path) -> TextToImage:
    pipe = TextToImage.from_pretrained(tiny_model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def tell(tiny_model: Path) -> ImageToText:
    pipe = ImageToText.from_pretrained(tiny_model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def noise(seed: int, side: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


# ------------------------------------------------------------------------------------------------ drawing


def test_pictures_and_codes_come_in_the_prompts_order(draw):
    out = draw(PROMPTS, num_images_per_prompt=2, num_inference_steps=3, generator=seeded(0, 1, 2, 3))
    assert [picture.size for picture in out.images] == [(16, 16)] * 4
    assert out.codes.shape == (4, 4, 4) and out.codes.min() >= 0 and out.codes.max() < 64
    alone = draw(PROMPTS[1], num_inference_steps=3, generator=seeded(3))
    assert torch.equal(alone.codes[0], out.codes[3])


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.5])
def test_a_row_does_not_depend_on_its_neighbours_or_their_padding(draw, guidance):
    settings = {"num_inference_steps": 4, "guidance_scale": guidance}
    together = draw(PROMPTS, generator=seeded(7, 8), **settings).codes
    for row, (prompt, seed) in enumerate(zip(PROMPTS, (7, 8), strict=True)):
        assert torch.equal(together[row], draw(prompt, generator=seeded(seed), **settings).codes[0])


def test_guidance_zero_forgets_the_prompt_and_guidance_matters(draw):
    def codes(prompt: str, scale: float) -> torch.Tensor:
        return draw(prompt, num_inference_steps=4, guidance_scale=scale, generator=seeded(5)).codes

    assert torch.equal(codes(PROMPTS[0], 0.0), codes(PROMPTS[1], 0.0))
    assert not torch.equal(codes(PROMPTS[0], 1.0), codes(PROMPTS[1], 1.0))
    assert not torch.equal(codes(PROMPTS[0], 1.0), codes(PROMPTS[0], 20.0))


def test_the_same_seed_draws_the_same_picture_and_another_one_another(draw):
    first, again, other = (draw(PROMPTS[0], num_inference_steps=4, generator=seeded(s)).codes for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    one = [draw(PROMPTS, num_inference_steps=2, generator=torch.Generator().manual_seed(3)).codes for _ in range(2)]
    assert torch.equal(*one)


def test_the_callback_sees_every_step_and_the_last_one_is_the_result(draw):
    steps: list[tuple[int, float, torch.Tensor, torch.Tensor]] = []

    def callback(pipe, step, timestep, kwargs):
        assert pipe is draw
        steps.append((step, timestep, kwargs["codes"], kwargs["undecided"]))

    out = draw(PROMPTS, num_inference_steps=5, generator=seeded(0, 1), callback_on_step_end=callback)
    assert [step for step, *_ in steps] == [0, 1, 2, 3, 4]
    shares = [timestep for _, timestep, *_ in steps]
    assert shares == sorted(shares, reverse=True) and shares[0] < 1 and shares[-1] == 0
    assert torch.equal(steps[-1][2], out.codes) and not steps[-1][3].any()
    # a decided place keeps its code to the end
    for _, _, codes, undecided in steps:
        assert torch.equal(codes[~undecided], out.codes[~undecided])
    frames = [draw.preview(codes, undecided)[0] for _, _, codes, undecided in steps]
    assert frames[-1].tobytes() == out.images[0].tobytes()
    undecided = steps[0][3][0].repeat_interleave(4, 0).repeat_interleave(4, 1).numpy()
    greys = np.asarray(frames[0])[undecided]
    assert len(greys) and greys.min() >= 101 and greys.max() <= 154


def test_tensors_on_request(draw):
    pixels = draw(PROMPTS[0], num_inference_steps=1, output_type="pt", generator=seeded(0)).images
    assert pixels.shape == (1, 3, 16, 16) and pixels.abs().max() <= 1


def test_more_steps_than_places_is_no_error(draw):
    assert draw(PROMPTS[0], num_inference_steps=99, generator=seeded(0)).codes.shape == (1, 4, 4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompt": "  "}, "The prompt is empty"),
        ({"prompt": []}, "0 prompts"),
        ({"prompt": "x" * 200}, "too long by .* tokens, the model has 64 positions"),
        ({"prompt": "x", "num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"prompt": "x", "guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"prompt": "x", "guidance_scale": -1.0}, "guidance_scale is -1.0"),
        ({"prompt": "x", "num_images_per_prompt": 0}, "0 pictures each"),
        ({"prompt": "x", "output_type": "latent"}, "output_type is 'latent'"),
        ({"prompt": "x", "generator": []}, "0 generators for 1 rows"),
    ],
)
def test_a_bad_argument_is_one_sentence(draw, arguments, words):
    with pytest.raises(InputError, match=words) as raised:
        draw(**arguments)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("prompt", ["日本語", "🍎", "\x00", "<|mask|><|eoi|>"])
def test_characters_never_seen_are_drawn(draw, prompt):
    assert draw(prompt, num_inference_steps=1, generator=seeded(0)).codes.shape == (1, 4, 4)


# ------------------------------------------------------------------------------------------------ describing, asking


def test_captions_and_how_sure_they_are(tell):
    out = tell([noise(0), noise(1, side=40)], num_inference_steps=4)
    assert len(out.texts) == len(out.confidences) == 2
    assert all(isinstance(text, str) and "<|" not in text for text in out.texts)
    assert all(0 < sure <= 1 for sure in out.confidences)
    assert tell(noise(1, side=40), num_inference_steps=4).texts == out.texts[1:]


def test_one_question_for_all_or_one_for_each(tell):
    questions = ["what colour is it?", "how many?"]
    each = tell([noise(0), noise(1)], questions, num_inference_steps=2).texts
    apart = [tell(noise(i), asked, num_inference_steps=2).texts[0] for i, asked in enumerate(questions)]
    assert each == apart
    assert len(tell([noise(0), noise(1)], questions[0], num_inference_steps=2).texts) == 2


@pytest.mark.parametrize(
    ("question", "words"),
    [("", "question is empty"), (["a?", "b?"], "2 questions about 1 pictures"), ("why? " * 60, "question is too long")],
)
def test_a_bad_question_is_one_sentence(tell, question, words):
    with pytest.raises(InputError, match=words):
        tell(noise(0), question)


# ------------------------------------------------------------------------------------------------ the model directory


def test_one_directory_serves_both_and_comes_back_from_disk_as_it_was(draw, tell, tiny_model, tmp_path):
    index = json.loads((tiny_model / "model_index.json").read_text())
    assert index["model"] == ["mmdlm.models.mask_predictor", "MaskPredictor"]
    assert index["visual_tokenizer"] == ["mmdlm.models.visual_tokenizer", "LFQTokenizer"]
    assert index["processor"] == ["mmdlm.processing", "MMDLMProcessor"]
    tell.presets["describe"]["num_inference_steps"] = 5
    try:
        tell.save_pretrained(tmp_path)
    finally:
        tell.presets["describe"] = dict(DEFAULT_PRESETS["describe"])
    again = TextToImage.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.presets["describe"]["num_inference_steps"] == 5 and again.presets["draw"] == DEFAULT_PRESETS["draw"]
    images = [pipe(PROMPTS[0], num_inference_steps=3, generator=seeded(9)).images[0] for pipe in (draw, again)]
    assert images[0].tobytes() == images[1].tobytes()
    assert model_hash(tmp_path) == model_hash(tiny_model)
    weights = {path.suffix for path in tmp_path.rglob("*") if path.stat().st_size > 10_000}
    assert weights <= {".safetensors", ".json"}
    # the path a model was loaded from is nobody's business
    assert not any(str(tiny_model) in path.read_text() for path in tmp_path.rglob("*.json"))


@pytest.mark.parametrize(
    ("preset", "said"),
    [
        ({"num_inference_steps": "many"}, "num_inference_steps is 'many'"),
        ({"guidance_scale": "high"}, "guidance_scale is 'high'"),
        ({"policy": "maskgit"}, "policy is 'maskgit', expected a table"),
        ({"draw": ["greedy"]}, "draw is .'greedy'., expected a table"),
        ({"cache": "dual_cache"}, "cache is 'dual_cache', expected a table"),
        ({"policy": {"name": "maskgit", "choice_temperature": {}}}, "policy"),
        ({"policy": None}, "policy is None, expected a table"),
        ({"guidance_interval": 3}, "guidance_interval is 3"),
        ({"guidance_interval": [0.5, "x"]}, "guidance_interval is"),
    ],
)
def test_a_broken_preset_is_said_in_a_sentence(copy, preset, said):
    (copy / "generation_config.json").write_text(json.dumps({"draw": preset}))
    with pytest.raises(InputError, match=said):
        TextToImage.from_pretrained(copy)("a cat")


@pytest.mark.parametrize(
    ("part", "setting", "said"),
    [
        ("visual_tokenizer/config.json", {"bit_order": "little"}, "counts its bits in the order 'little'"),
        ("visual_tokenizer/config.json", {"bit_order": "mid"}, "bit order is 'mid'"),
        ("model/config.json", {"bit_order": "mid"}, "bit order is 'mid'"),
        ("model/config.json", {"max_positions": None}, "max_positions is None"),
        ("processor/processor_config.json", {"image_size": "big"}, "image_size is 'big'"),
        ("processor/processor_config.json", {"image_size": 0}, "image_size is 0"),
        ("model_index.json", "[" * 100_000, "cannot be read as JSON"),
    ],
)
def test_a_broken_part_is_said_when_it_is_loaded(copy, part, setting, said):
    settings = setting if isinstance(setting, str) else json.dumps(json.loads((copy / part).read_text()) | setting)
    (copy / part).write_text(settings)
    with pytest.raises(InputError, match=said):
        TextToImage.from_pretrained(copy)


@pytest.mark.parametrize("length", [0, -3, "eight", 2.5])
def test_an_answer_length_that_is_none(tell, length):
    before = tell.presets["describe"]
    tell.presets["describe"] = before | {"answer_length": length}
    try:
        with pytest.raises(InputError, match="answer_length is"):
            tell(Image.new("RGB", (8, 8)))
    finally:
        tell.presets["describe"] = before


def test_presets_of_the_directory_override_the_defaults(copy):
    presets = {"draw": {"num_inference_steps": 2, "policy": {"name": "top_k"}}}
    (copy / "generation_config.json").write_text(json.dumps(presets))
    loaded = TextToImage.from_pretrained(copy).presets
    assert loaded["draw"] == {**DEFAULT_PRESETS["draw"], **presets["draw"]} and loaded["ask"] == DEFAULT_PRESETS["ask"]


def test_half_precision_is_a_choice_and_a_way_to_save(draw, tiny_model, tmp_path):
    half = TextToImage.from_pretrained(tiny_model, dtype=torch.float16)
    assert half.model.dtype == half.visual_tokenizer.dtype == torch.float16
    half.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model" / "model.safetensors")["head.weight"].dtype == torch.float16
    again = TextToImage.from_pretrained(tmp_path)
    assert again.model.dtype == again.visual_tokenizer.dtype == torch.float32
    assert torch.allclose(again.model.head.weight, draw.model.head.weight, atol=1e-3)


def spoil(directory: Path, how: str) -> str:
    """Break a copy of a good model directory in one way; returns the words the error has to say."""
    index, weights = directory / "model_index.json", directory / "model" / "model.safetensors"
    content = json.loads(index.read_text())
    if how == "no index":
        index.unlink()
        return "has no model_index.json"
    if how == "index is no JSON":
        index.write_text("{")
        return "cannot be read as JSON"
    if how == "another family":
        index.write_text(json.dumps({"_class_name": "FluxPipeline", "vae": ["diffusers", "AutoencoderKL"]}))
        return "is a model of FluxPipeline"
    if how == "foreign code":
        index.write_text(json.dumps({**content, "processor": ["os", "system"]}))
        return "expected one of mmdlm's classes"
    if how == "no class":
        index.write_text(json.dumps({**content, "model": ["mmdlm.models.mask_predictor", 7]}))
        return "expected one of mmdlm's classes"
    if how == "another format":
        index.write_text(json.dumps({**content, "_mmdlm_format": 99}))
        return "another version of mmdlm .format 99"
    if how == "no component":
        shutil.rmtree(directory / "visual_tokenizer")
        return "no folder visual_tokenizer"
    if how == "pickle":
        torch.save({}, directory / "model" / "pytorch_model.bin")
        weights.unlink()
        return "no safetensors weights"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
        return "broken or cut short"
    if how == "empty weights":
        weights.write_bytes(b"")
        return "broken or cut short"
    if " of " in how:
        return spoil_json(directory, *how.split(" of "))
    tensors = load_file(weights)
    if how == "weight missing":
        tensors.pop("bits_in")
    elif how == "weight unknown":
        tensors["extra.weight"] = torch.zeros(2)
    else:
        assert how == "another shape"
        tensors["head.weight"] = torch.zeros(7, 32)
    save_file(tensors, weights, metadata={"format": "pt"})
    return "does not fit this version" if how == "another shape" else "was saved by another version: 1 weights"


def spoil_json(directory: Path, how: str, file: str) -> str:
    """The same for one JSON file of a component."""
    path = directory / file
    content = json.loads(path.read_text())
    if how == "first half":
        path.write_text(path.read_text()[: path.stat().st_size // 2])
        return f"{file} cannot be read as JSON"
    if how == "bytes":
        path.write_bytes(b"\xff\xfe\x00")
        return f"{file} cannot be read as JSON"
    if how == "list":
        path.write_text("[]")
        return f"{file} holds a list, expected a table"
    if how == "nothing":
        path.write_text("{}")
        return "no words in model.vocab" if path.name == "tokenizer.json" else "does not fit|got no vocabulary"
    if how == "no words":
        content["model"]["vocab"] = {}
        words = "no words in model.vocab"
    elif how == "no merges":
        del content["model"]["merges"]
        words = "does not fit this version of mmdlm"
    elif how == "no model_type":
        del content["trunk"]["model_type"]
        words = "has a trunk without a model_type"
    elif how == "no width":
        content["trunk"]["hidden_size"] = None
        words = "does not fit this version of mmdlm .Validation error for field 'hidden_size'"
    elif how == "no table":
        content["vocabulary"] = [1]
        words = "does not fit this version of mmdlm"
    else:
        assert how == "odd word"
        content["pad_token"] = {"a": 1}
        words = "does not fit this version of mmdlm .Special token pad_token"
    path.write_text(json.dumps(content))
    return words


BROKEN = [
    "no index",
    "index is no JSON",
    "another family",
    "foreign code",
    "no class",
    "another format",
    "no component",
    "pickle",
    "truncated",
    "empty weights",
    "weight missing",
    "weight unknown",
    "another shape",
    *(f"{how} of {file}" for how in ("first half", "bytes", "list", "nothing") for file in (
        "model/config.json", "processor/processor_config.json", "processor/tokenizer.json",
    )),
    *(f"{how} of processor/tokenizer_config.json" for how in ("first half", "list", "odd word")),
    *(f"{how} of visual_tokenizer/config.json" for how in ("first half", "list")),
    "no words of processor/tokenizer.json",
    "no merges of processor/tokenizer.json",
    "no model_type of model/config.json",
    "no width of model/config.json",
    "no table of processor/processor_config.json",
]


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_model_directory_is_one_sentence(copy, how):
    words = spoil(copy, how)
    with pytest.raises(InputError, match=words) as raised:
        TextToImage.from_pretrained(copy)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("part", ["", "model", "visual_tokenizer", "processor"])
@pytest.mark.parametrize("mode", [0o000, 0o400, 0o100])
def test_a_directory_that_may_not_be_read(copy, part, mode):
    (copy / part).chmod(mode)
    try:
        with pytest.raises(InputError, match="may not be read by you: change its permissions"):
            check_model_directory(copy)
    finally:
        (copy / part).chmod(0o700)


def test_a_bug_while_loading_stays_a_bug(copy, monkeypatch):
    class OddError(Exception):
        pass

    def broken(*_, **__):
        raise OddError

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", broken)
    with pytest.raises(OddError):
        TextToImage.from_pretrained(copy)


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="no model directory at"):
        check_model_directory(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"has no model_index\.json"):
        ImageToText.from_pretrained(tmp_path)


def test_parts_of_two_models_do_not_fit_together(draw):
    from mmdlm.processing import MMDLMProcessor

    other = {**draw.processor.vocabulary.to_dict(), "image_size": 32}
    with pytest.raises(InputError, match="take both from one model directory"):
        TextToImage(draw.model, draw.visual_tokenizer, MMDLMProcessor(draw.processor.tokenizer, other, 16))


# ------------------------------------------------------------------------------------------------ how sure, and by what


def test_every_output_says_how_sure_each_token_was(draw, tell):
    pictures = draw(PROMPTS, num_inference_steps=3, generator=seeded(0, 1))
    assert pictures.confidence.shape == pictures.codes.shape
    assert pictures.confidence.min() > 0 and pictures.confidence.max() <= 1
    words = tell([noise(0), noise(1)], num_inference_steps=4)
    for tokens, sure in zip(words.tokens, words.confidences, strict=True):
        assert all(0 < share <= 1 for _, share in tokens)
        assert sure == pytest.approx(float(np.exp(np.mean([np.log(share) for _, share in tokens]))), rel=1e-4)


def test_a_rule_for_one_call(draw, tell):
    few = draw(PROMPTS[0], policy={"name": "threshold", "tau": 1e-6}, generator=seeded(0))
    assert few.codes.shape == (1, 4, 4)
    steps: list[int] = []
    settings = {"policy": {"name": "threshold", "tau": 1.0}, "callback_on_step_end": lambda *a: steps.append(a[1])}
    tell(noise(0), **settings)  # as many passes as the rule needs, more than the preset's
    assert len(steps) > tell.presets["describe"]["num_inference_steps"]
    steps.clear()
    tell(noise(0), num_inference_steps=4, **settings)
    assert len(steps) == 4
    with pytest.raises(InputError, match="tau is 0"):
        tell(noise(0), policy={"name": "threshold", "tau": 0})
