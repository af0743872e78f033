"""The tokenizer learns from any folder of pictures, from scratch or from a saved one; its terms have their signs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from mmdlm.data.picture_batches import open_batches
from mmdlm.errors import InputError
from mmdlm.models.visual_tokenizer import LFQTokenizer
from mmdlm.pipelines import TextToImage
from mmdlm.training.run_log import read_metrics

TINY = [
    "train_batch_size=4", "validation_pictures=8", "logging_steps=1", "ema_decay=0.9", "validation_steps=100",
    "l1_weight=0", "l2_weight=1", "gradient_weight=0",
]  # fmt: skip
SHAPE = (
    "model={sample_size: 16, codebook_bits: 6, encoder_widths: [8, 16], decoder_widths: [8, 16], encoder_blocks: 1, "
    "decoder_blocks: 1}"
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty small pictures, of which one is there twice and one is broken, without a word."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(20):
        colours = [(number * step + 40) % 256 for step in (97, 151, 57)]
        picture = Image.new("RGB", (24, 18), tuple(colours))
        picture.paste(tuple(255 - c for c in colours), (number % 12, 4, number % 12 + 8, 12))
        picture.save(folder / f"{number:02}.png")
    (folder / "again.png").write_bytes((folder / "03.png").read_bytes())
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def test_batches_of_a_folder(pictures: Path, capsys: pytest.CaptureFixture[str]):
    train, held_out = open_batches(str(pictures), side=16, held_out_share=0.2, seed=0, world={})
    assert (train.size, held_out.size) == (16, 4) and "1 pictures left out" in capsys.readouterr().out
    first, second = train.batch(range(16)), train.batch(range(16, 32))
    assert first.shape == (16, 3, 16, 16) and float(first.abs().max()) <= 1
    assert len({row.numpy().tobytes() for row in first}) == 16
    assert {row.numpy().tobytes() for row in first} == {row.numpy().tobytes() for row in second}
    assert not torch.equal(first, second)  # an order of its own for every epoch
    again = open_batches(str(pictures), side=16, held_out_share=0.2, seed=0, world={})[0]
    assert torch.equal(again.batch([20, 3]), train.batch([20, 3]))
    with pytest.raises(InputError, match="No data was named"):
        open_batches("", side=16, held_out_share=0.2, seed=0, world={})


def test_a_folder_trains_a_tokenizer_and_training_goes_on_from_it(run, pictures: Path, tmp_path: Path):
    first, second = tmp_path / "first", tmp_path / "second"
    run("tokenizers/train_lfq", *TINY, SHAPE, f"data={pictures}", f"out={first}", "max_train_steps=3")
    rows = read_metrics(first)
    assert rows[-1].keys() >= {"psnr", "codes_used", "dead_codes", "used_share", "perplexity"}
    with Image.open(first / "codes-3.png") as dashboard:
        assert dashboard.width > 800
    for row in rows[:3]:
        strength = max(1.0, 4.0 * (1 - (row["step"] - 1) / 500))
        term = 0.01 * row["sample_entropy"] - strength * 0.02 * row["codebook_entropy"]
        assert row["entropy_term"] == pytest.approx(term, rel=1e-3, abs=1e-6)
        whole = row["reconstruction"] + 0.05 * row["commitment"] + row["entropy_term"]
        assert row["loss"] == pytest.approx(whole, rel=1e-4, abs=1e-6)
        assert row["train_codes_used"] + row["train_dead_codes"] == 64

    saved = first / "visual_tokenizer"
    settings = [*TINY, f"data={pictures}", f"init_from={saved}", "max_train_steps=1"]
    run("tokenizers/train_lfq", *settings, f"out={second}", "learning_rate=0", "model.entropy_temperature=0.5")
    made, known = (LFQTokenizer.from_pretrained(path) for path in (second / "visual_tokenizer", saved))
    assert made.config["encoder_widths"] == [8, 16] and made.config["entropy_temperature"] == 0.5
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(made.encode(pixels), known.encode(pixels))
    for less in ("codebook_bits=8", "stem_patch=1"):
        with pytest.raises(InputError, match=f"{less.replace('=', ' is ')}, but"):
            run("tokenizers/train_lfq", *settings, f"out={tmp_path / 'third'}", f"model.{less}")
    with pytest.raises(InputError, match="init_from is"):
        run("tokenizers/train_lfq", *settings, "init_from=nowhere", f"out={tmp_path / 'third'}")


def test_training_goes_on_from_a_published_layout_which_cannot_grow(run, pictures: Path, tmp_path: Path):
    torch.manual_seed(0)
    shape = {"encoder_widths": (32, 32), "decoder_widths": (32, 32), "encoder_blocks": (1, 2), "decoder_blocks": (2, 1)}
    known = LFQTokenizer(sample_size=16, codebook_bits=6, layout="magvitv2", stem_patch=1, **shape)
    known.save_pretrained(tmp_path / "known")
    settings = [*TINY, f"data={pictures}", f"init_from={tmp_path / 'known'}", "max_train_steps=1", "learning_rate=0"]
    run("tokenizers/train_lfq", *settings, f"out={tmp_path / 'out'}")
    made = LFQTokenizer.from_pretrained(tmp_path / "out" / "visual_tokenizer")
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(made.encode(pixels), known.eval().encode(pixels))
    with pytest.raises(InputError, match="has the layout magvitv2 and the quantizer lfq, expected patched"):
        run("tokenizers/train_lfq", *settings, f"out={tmp_path / 'more'}", "grow={codebook_bits: 8}")


def test_finite_scalar_quantisation_is_one_word_and_a_predictor_learns_its_codes(
    run, world: Path, tiny_supervised: list[str], tmp_path: Path
):
    steps = ["max_train_steps=2", "checkpointing_steps=2", "validation_steps=2", f"data={world}", "logging_steps=1"]
    model = "model={quantizer: fsq, codebook_bits: 8, encoder_widths: [8, 8], decoder_widths: [8, 8]}"
    few = ["concepts=16", "train_batch_size=2", "validation_pictures=2"]
    run("tokenizers/train_lfq", *steps, *few, model, f"out={tmp_path / 'tokenizer'}")
    tokenizer = tmp_path / "tokenizer" / "visual_tokenizer"
    run("train/supervised", *tiny_supervised, *steps, f"tokenizer={tokenizer}", f"out={tmp_path / 'predictor'}")
    pipe = TextToImage.from_pretrained(tmp_path / "predictor" / "pipeline")
    assert pipe.processor.vocabulary.image_size == 240 and pipe.model.config.code_bits == 0
    assert pipe("a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0].size == (64, 64)
