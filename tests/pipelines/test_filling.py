"""Fill on a tiny model of random weights: what is not masked comes back, rows are independent, and every bad input."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmdlm.errors import InputError
from mmdlm.pipelines import Fill, TextToImage
from mmdlm.sampling.replay import Recording

PROMPT = "a red apple"


@pytest.fixture(scope="module")
def fill(tiny_model: Path) -> Fill:
    pipe = Fill.from_pretrained(tiny_model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def noise(seed: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def white(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", size, 0)
    mask.paste(255, box)
    return mask


def codes_of(pipe: Fill, picture: Image.Image) -> torch.Tensor:
    with torch.no_grad():
        return pipe.visual_tokenizer.encode(pipe.processor.pixels(picture))[0]


HALF = white((16, 16), (9, 0, 16, 16))  # from the tenth pixel on: cells of the third and fourth column


@pytest.mark.parametrize("text", [None, PROMPT])
def test_codes_outside_the_mask_are_the_given_ones(fill, text):
    out = fill(text, noise(0), HALF, num_inference_steps=3, guidance_scale=2.0, generator=seeded(0))
    assert out.filled.tolist() == [[[False, False, True, True]] * 4]
    before = codes_of(fill, noise(0))
    assert torch.equal(out.codes[0][:, :2], before[:, :2])
    assert out.confidence[0][:, :2].eq(1).all() and (out.confidence[0][:, 2:] < 1).all()
    assert out.texts == (None if text is None else [text]) and [p.size for p in out.images] == [(16, 16)]
    other = fill(text, noise(0), HALF, num_inference_steps=3, guidance_scale=2.0, generator=seeded(1))
    assert not torch.equal(other.codes, out.codes) and torch.equal(other.codes[..., :2], out.codes[..., :2])


@pytest.mark.parametrize("size", [(16, 16), (40, 40), (40, 30), (6, 10)])
def test_with_keep_pixels_every_pixel_outside_the_mask_is_the_given_one(fill, size):
    picture, mask = noise(1, size), white(size, (size[0] // 2, 0, size[0], size[1] // 2))
    out = fill(None, picture, mask, num_inference_steps=2, keep_pixels=True, generator=seeded(0)).images[0]
    assert out.size == size
    outside = np.asarray(mask) == 0
    assert np.array_equal(np.asarray(out)[outside], np.asarray(picture)[outside])
    assert not np.array_equal(np.asarray(out)[~outside], np.asarray(picture)[~outside])


def test_a_whole_mask_is_drawing(fill, tiny_model):
    draw = TextToImage.from_pretrained(tiny_model)
    draw.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 4, "guidance_scale": 1.5}
    out = fill(PROMPT, generator=seeded(5), **settings)
    assert torch.equal(out.codes, draw(PROMPT, generator=seeded(5), **settings).codes.cpu())


def test_borders_are_drawn_around_a_picture(fill):
    small = noise(2, (8, 12))
    out = fill(PROMPT, small, extend=(4, 0, 4, 4), num_inference_steps=2, keep_pixels=True, generator=seeded(0))
    assert out.filled[0].tolist() == [[True, False, False, True]] * 3 + [[True] * 4]
    assert out.images[0].crop((4, 0, 12, 12)).tobytes() == small.tobytes()


def test_variations_keep_a_share_and_differ(fill):
    out = fill(None, noise(3), strength=0.25, num_inference_steps=2, generator=seeded(0), keep_pixels=True)
    two = fill([PROMPT] * 2, [noise(3)] * 2, strength=0.25, num_inference_steps=2, generator=seeded(0, 1))
    assert out.filled.sum().item() == 4 and two.filled.sum(dim=(1, 2)).tolist() == [4, 4]
    assert torch.equal(out.filled[0], two.filled[0]) and not torch.equal(two.filled[0], two.filled[1])
    kept = ~out.filled[0]
    assert torch.equal(out.codes[0][kept], codes_of(fill, noise(3))[kept])
    pixels = kept.repeat_interleave(4, 0).repeat_interleave(4, 1).numpy()
    assert np.array_equal(np.asarray(out.images[0])[pixels], np.asarray(noise(3))[pixels])


def test_given_words_stay_and_holes_hold_words(fill):
    out = fill("a [MASK:2] on a [MASK:1] background", noise(4), draw=False, num_inference_steps=3, generator=seeded(0))
    assert out.images is None and out.codes is None
    ids = fill.processor.text_ids
    words = [word for word, _ in out.tokens[0]]
    sure = [share for _, share in out.tokens[0]]
    first, second, third = (len(ids(part)) for part in ("a", " on a", " background"))
    assert words[:first] == ["a"] and sure[:first] == [1.0] * first
    assert "".join(words[first + 2 : first + 2 + second]) == " on a"
    assert "".join(words[-1 - third : -1]) == " background" and words[-1] == "<|eos|>"
    found = [*sure[first : first + 2], sure[first + 2 + second]]
    assert len(words) == first + second + third + 4 and all(0 < share < 1 for share in found)
    assert not any("<|" in word for word in words[:-1])


def test_an_open_hole_may_end_the_text(fill):
    out = fill("a[MASK:*]", noise(4), draw=False, num_inference_steps=30, generator=seeded(0))
    assert out.texts[0].startswith("a") and len(out.tokens[0]) <= fill.presets["describe"]["answer_length"]


def test_choices_are_scored_and_one_is_taken(fill):
    out = fill("a [MASK:{red|blue}] car on a [MASK:{green|yellow}] background", noise(5), draw=False)
    tables = out.choices[0]
    assert [set(table) for table in tables] == [{"red", "blue"}, {"green", "yellow"}]
    for table in tables:
        assert sum(table.values()) == pytest.approx(1)
    best = [max(table, key=table.get) for table in tables]
    assert out.texts == [f"a {best[0]} car on a {best[1]} background"]
    # of unlike lengths, and with a hole beside it
    longer = fill("a [MASK:{red apple|car}] [MASK:1]", noise(5), draw=False, num_inference_steps=1)
    assert longer.texts[0].startswith(("a red apple", "a car")) and sum(longer.choices[0][0].values()) \
        == pytest.approx(1)


@pytest.mark.parametrize("together", [False, True])
def test_words_and_picture_from_parts_of_either(fill, together):
    templates = ["a [MASK:1] apple", "two [MASK:2] on a blue background"]
    settings = {"num_inference_steps": 3, "together": together}
    out = fill(templates, noise(6), HALF, generator=seeded(0, 1), **settings)
    assert torch.equal(out.codes[:, :, :2], codes_of(fill, noise(6))[:, :2].expand(2, -1, -1))
    assert out.texts[0].endswith("apple") and out.texts[1].startswith("two")
    for row, template in enumerate(templates):  # a row does not depend on its neighbours or their padding
        alone = fill(template, noise(6), HALF, generator=seeded(row), **settings)
        assert alone.texts == out.texts[row : row + 1] and torch.equal(alone.codes[0], out.codes[row])


def test_steps_are_seen_and_played_back(fill, tmp_path):
    seen: dict[str, list[torch.Tensor]] = {"codes": [], "ids": []}

    def callback(pipe, step, share, tensors):
        for name in seen.keys() & tensors.keys():
            seen[name].append(tensors[name].clone())
        assert 0 <= share < 1

    def run(path):
        for frames in seen.values():
            frames.clear()
        recording = Recording(path)
        out = fill("a [MASK:1] apple", noise(7), HALF, num_inference_steps=3, generator=seeded(0), replay=recording,
                   callback_on_step_end=callback)
        if not recording.playing:
            path.write_bytes(recording.content())
        return out, {name: list(frames) for name, frames in seen.items()}

    (first, live), (second, played) = run(tmp_path / "steps"), run(tmp_path / "steps")
    assert len(live["codes"]) == 3 and len(live["ids"]) == 1
    assert all(torch.equal(a, b) for name in live for a, b in zip(live[name], played[name], strict=True))
    assert first.texts == second.texts and torch.equal(first.codes, second.codes)
    assert torch.equal(first.confidence, second.confidence) and torch.equal(live["codes"][-1], first.codes)
    assert first.images[0].tobytes() == second.images[0].tobytes()


def test_other_rules_than_the_presets(fill):
    for policy in ({"name": "threshold", "tau": 0.5}, {"name": "remdm", "eta": 0.2}):
        out = fill(PROMPT, noise(8), HALF, policy=policy, generator=seeded(0))
        assert torch.equal(out.codes[0][:, :2], codes_of(fill, noise(8))[:, :2])
    # rules that ask about what is written, hidden from itself: words can be asked so, folded pictures not
    for name in ("revoke", "with_edits"):
        policy = {"name": name, **({"policy": {"name": "threshold"}} if name == "with_edits" else {})}
        assert fill("a [MASK:3]", noise(8), draw=False, policy=policy).texts[0].startswith("a")
        with pytest.raises(InputError, match=f"The policy {name} asks about written tokens .* folds image tokens"):
            fill(PROMPT, noise(8), HALF, policy=policy)
        with pytest.raises(InputError, match="not for words and picture together"):
            fill("a [MASK:1]", noise(8), HALF, policy=policy, together=True)


PICTURE = noise(0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "neither a picture nor a text"),
        ({"text": PROMPT, "images": PICTURE}, "nothing to fill"),
        ({"text": PROMPT, "draw": False}, "nothing to fill"),
        ({"text": PROMPT, "masks": HALF}, "no picture"),
        ({"text": PROMPT, "strength": 0.5}, "no picture"),
        ({"images": PICTURE, "masks": white((16, 15), (0, 0, 9, 9))}, "16 x 15 pixels, the picture 16 x 16"),
        ({"images": PICTURE, "masks": Image.new("L", (16, 16), 0)}, "no white pixel"),
        ({"images": PICTURE, "masks": HALF, "extend": (4, 0, 0, 0)}, "one of them"),
        ({"images": PICTURE, "extend": (4, 0, 4, 0)}, "24 x 16 with its extension, .* scale it to 8 x 16"),
        ({"images": noise(0, (14, 16)), "extend": (2, 0, 0, 0)}, "multiples of 4"),
        ({"images": PICTURE, "extend": (16, 0, 0, 0)}, "extend it less"),
        ({"images": PICTURE, "extend": (0, 0, 0, 0)}, "multiples of 4"),
        ({"images": PICTURE, "strength": 0.0}, "strength is 0.0"),
        ({"images": PICTURE, "strength": 1.5}, "strength is 1.5"),
        ({"images": [PICTURE] * 2, "masks": [HALF] * 3}, "2 pictures for 3 rows"),
        ({"images": PICTURE, "masks": HALF, "generator": []}, "0 generators for 1 rows"),
        ({"images": PICTURE, "masks": HALF, "num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"images": PICTURE, "masks": HALF, "guidance_scale": -1.0}, "guidance_scale is -1.0"),
        ({"images": PICTURE, "masks": HALF, "policy": {"name": "threshold", "tau": 1.5}}, "tau is 1.5"),
        ({"text": "a [MASK:60]", "draw": False}, "text is too long by .* tokens, the model has 64 positions"),
        ({"text": "word " * 60 + "[MASK:1]", "draw": False}, "text is too long by"),
        ({"text": "a [MASK:0]", "draw": False}, "is no hole"),
    ],
)
def test_a_bad_argument_is_one_sentence(fill, arguments, words):
    with pytest.raises(InputError, match=words) as raised:
        fill(**arguments)
    assert "\n" not in str(raised.value)


def test_guidance_needs_a_model_that_knows_no_prompt(fill):
    fill.presets["draw"]["unprompted"] = False
    try:
        with pytest.raises(InputError, match="never trained without prompts"):
            fill(PROMPT, guidance_scale=2.0)
        assert fill(PROMPT, guidance_scale=1.0, num_inference_steps=1).images is not None
    finally:
        del fill.presets["draw"]["unprompted"]


def test_a_hole_holds_words_of_its_pattern(fill):
    picture = noise(3)
    texts = ["[MASK:3:/[a-f]+/] x", "[MASK:{red|green}] y [MASK:*:/[0-9]{2}/]"]
    found = fill(texts, [picture, picture], draw=False).texts
    assert re.fullmatch("[a-f]+ x", found[0]) and re.fullmatch("(red|green) y [0-9]{2}", found[1])
    assert fill(texts[0], picture, draw=False).texts == found[:1]
    with pytest.raises(InputError, match="no text of 2 tokens"):
        fill("[MASK:2:/a/]", picture, draw=False)
