"""Published visual tokenizers as ours: there and back bit for bit, every kind of file, every wrong one a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from mmdlm.convert import lumina_vq, magvitv2, open_magvit2, visual
from mmdlm.convert.visual import load_visual_tokenizer
from mmdlm.errors import InputError
from mmdlm.models.visual_tokenizer import LFQTokenizer
from mmdlm.models.vq_tokenizer import VQTokenizer
from mmdlm.pipelines import TextToImage

CODER = {"ch": 32, "ch_mult": [1, 2, 1], "num_res_blocks": [1, 2, 1], "resolution": 16, "z_channels": 6}
CONFIGS = {
    "magvitv2": {
        "_class_name": "MAGVITv2",
        "encoder": CODER | {"attn_resolutions": [5]},
        "decoder": CODER | {"ch_mult": [2, 1, 1], "num_res_blocks": [2, 1, 1]},
        "quantize": {"codebook_dim": 6},
    },
    "open_magvit2": {
        "model": {
            "class_path": "src.Open_MAGVIT2.models.lfqgan.VQModel",
            "init_args": {
                "ddconfig": {
                    "double_z": False,
                    "z_channels": 6,
                    "resolution": 16,
                    "in_channels": 3,
                    "out_ch": 3,
                    "ch": 32,
                    "ch_mult": [1, 2, 1],
                    "num_res_blocks": 1,
                },
                "n_embed": 64,
                "embed_dim": 6,
                "use_ema": False,
                "factorized_bits": [2, 4],
            },
        }
    },
    "lumina_vq": {
        "_class_name": "VQModel",
        "block_out_channels": [32, 64, 32],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "latent_channels": 4,
        "num_vq_embeddings": 64,
        "sample_size": 16,
        "lookup_from_codebook": True,
    },
}
FAMILIES = {"magvitv2": magvitv2, "open_magvit2": open_magvit2, "lumina_vq": lumina_vq}


def published(family: str, directory: Path, *, name: str = "model.safetensors") -> dict[str, torch.Tensor]:
    """A small tokenizer of random weights, written as its authors would; its tensors under their names."""
    torch.manual_seed(0)
    state = FAMILIES[family].from_mmdlm(FAMILIES[family].build(CONFIGS[family]).state_dict())
    state = {key: value.contiguous() for key, value in state.items()}
    for value in state.values():
        if value.ndim > 1 and value.shape != (64, 6):  # out of zeros; not the table of bits
            value.normal_(std=0.1)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIGS[family]))
    if name.endswith(".safetensors"):
        save_file(state, directory / name)
    elif name:
        torch.save(state, directory / name)
    return state


def rewrite(directory: Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def pixels(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def same(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return state.keys() == other.keys() and all(
        state[name].dtype == other[name].dtype and torch.equal(state[name], other[name]) for name in state
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_bit_for_bit(family: str, tmp_path: Path):
    state = published(family, tmp_path / "theirs")
    tokenizer = load_visual_tokenizer(tmp_path / "theirs")
    assert not tokenizer.training and (tokenizer.downsample, tokenizer.codebook_size) == (4, 64)
    back, config = visual.from_mmdlm(tokenizer)
    assert same(back, state)
    # The configuration that goes back is read as the one that came, and describes the same tokenizer.
    assert FAMILIES[family].configuration(config) == FAMILIES[family].configuration(CONFIGS[family])
    # Saved as ours and loaded by either door it gives the same codes and pixels.
    tokenizer.save_pretrained(tmp_path / "ours")
    picture = pixels(2, 3, 8, 12)
    codes = tokenizer.encode(picture)
    assert codes.shape == (2, 2, 3) and len(codes.unique()) > 1
    for again in (type(tokenizer).from_pretrained(tmp_path / "ours"), load_visual_tokenizer(tmp_path / "ours")):
        assert torch.equal(again.encode(picture), codes) and torch.equal(again.decode(codes), tokenizer.decode(codes))


def test_a_unfolded_channel_keeps_its_place(tmp_path: Path):
    """Open-MAGVIT2 unfolds 4C channels as (row, column, C): the first C of them are the upper left pixels."""
    state = published("open_magvit2", tmp_path)
    up = load_visual_tokenizer(tmp_path).decoder.ups[0]
    x = torch.randn(1, 32, 3, 3, generator=torch.Generator().manual_seed(0))
    wide = torch.nn.functional.conv2d(
        x, state["decoder.up.2.upsample.conv1.weight"], state["decoder.up.2.upsample.conv1.bias"], padding=1
    )
    for row in (0, 1):
        for column in (0, 1):
            first = 32 * (2 * row + column)
            torch.testing.assert_close(up(x)[:, :, row::2, column::2], wide[:, first : first + 32])


def test_the_published_magvitv2_names_no_architecture():
    model = visual.empty_tokenizer(magvitv2, {"_class_name": "MAGVITv2", "_diffusers_version": "0.32.2"})
    assert (model.downsample, model.codebook_size, model.config["sample_size"]) == (16, 8192, 256)
    state = magvitv2.from_mmdlm(model.state_dict())
    assert sum(tensor.numel() for tensor in state.values()) == 95_493_513


@pytest.mark.parametrize("name", ["pytorch_model.safetensors", "pytorch_model.bin", "weights.pth"])
def test_weights_under_any_of_their_names(name: str, tmp_path: Path):
    state = published("magvitv2", tmp_path, name=name)
    assert same(visual.from_mmdlm(load_visual_tokenizer(tmp_path))[0], state)


def test_a_lightning_checkpoint_beside_its_yaml(tmp_path: Path):
    state = published("open_magvit2", tmp_path, name="")
    (tmp_path / "config.json").unlink()
    (tmp_path / "imagenet.yaml").write_text(yaml.safe_dump(CONFIGS["open_magvit2"] | {"trainer": {"devices": 8}}))
    averages = {f"model_ema.{name.replace('.', '')}": value + 1 for name, value in state.items()}
    counters = {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(7, dtype=torch.int32)}
    rest = averages | counters | {"loss.discriminator.main.0.weight": torch.zeros(3)}
    torch.save({"state_dict": state | rest, "epoch": 3, "global_step": 9}, tmp_path / "last.ckpt")
    last, averaged = load_visual_tokenizer(tmp_path), load_visual_tokenizer(tmp_path, averaged=True)
    assert same(visual.from_mmdlm(last)[0], state)
    assert same(visual.from_mmdlm(averaged)[0], {name: value + 1 for name, value in state.items()})
    # use_ema decides where nobody does.
    settings = yaml.safe_load((tmp_path / "imagenet.yaml").read_text())
    settings["model"]["init_args"]["use_ema"] = True
    (tmp_path / "imagenet.yaml").write_text(yaml.safe_dump(settings))
    assert same(load_visual_tokenizer(tmp_path).state_dict(), averaged.state_dict())
    assert same(load_visual_tokenizer(tmp_path, averaged=False).state_dict(), last.state_dict())


def test_luminas_lies_in_a_folder_of_the_model(tmp_path: Path):
    published("lumina_vq", tmp_path / "vqvae", name="diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llada"}))
    tokenizer = load_visual_tokenizer(tmp_path)
    assert isinstance(tokenizer, VQTokenizer) and tokenizer.codebook_size == 64


def test_a_dtype_is_kept_or_asked_for(tmp_path: Path):
    published("magvitv2", tmp_path / "theirs")
    half = load_visual_tokenizer(tmp_path / "theirs", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    half.save_pretrained(tmp_path / "ours")
    assert load_visual_tokenizer(tmp_path / "ours").dtype == torch.bfloat16
    assert load_visual_tokenizer(tmp_path / "ours", dtype=torch.float32).dtype == torch.float32
    with pytest.raises(InputError, match="The device 'nowhere' cannot be used here"):
        load_visual_tokenizer(tmp_path / "ours", device="nowhere")


def test_our_own_directories_are_read_too(tiny_model: Path, tmp_path: Path):
    tokenizer = LFQTokenizer.from_pretrained(tiny_model / "visual_tokenizer")
    picture = pixels(1, 3, 16, 16)
    for source in (tiny_model, tiny_model / "visual_tokenizer"):
        assert torch.equal(load_visual_tokenizer(source).encode(picture), tokenizer.encode(picture))
    # Finite scalar quantisation has small tables that are no weights.
    scalar = LFQTokenizer(quantizer="fsq", fsq_levels=(5, 4), encoder_widths=(8, 8), decoder_widths=(8, 8)).eval()
    scalar.save_pretrained(tmp_path)
    assert torch.equal(load_visual_tokenizer(tmp_path).encode(picture), scalar.encode(picture))
    with pytest.raises(InputError, match="layout is 'patched', which nobody else has published"):
        visual.from_mmdlm(tokenizer)


@pytest.mark.parametrize("family", ["magvitv2", "lumina_vq"])
def test_a_converted_tokenizer_is_a_component_of_a_model(family: str, tiny_model: Path, tmp_path: Path):
    published(family, tmp_path / "theirs")
    tokenizer = load_visual_tokenizer(tmp_path / "theirs")
    whole = TextToImage.from_pretrained(tiny_model)
    TextToImage(whole.model, tokenizer, whole.processor).save_pretrained(tmp_path / "model")
    again = TextToImage.from_pretrained(tmp_path / "model")
    assert type(again.visual_tokenizer) is type(tokenizer)
    codes = torch.arange(64).view(4, 4, 4)
    assert torch.equal(again.visual_tokenizer.decode(codes), tokenizer.decode(codes))
    drawn = again("a red apple", generator=torch.Generator().manual_seed(0), num_inference_steps=2)
    assert drawn.images[0].size == (16, 16)


def test_weights_that_disagree_are_named(tmp_path: Path):
    state = published("magvitv2", tmp_path)
    name = "encoder.down.1.block.0.conv1.weight"
    save_file({key: value for key, value in state.items() if key != name}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=rf"lacks 1 of \d+ tensors, the first is {name}"):
        load_visual_tokenizer(tmp_path)
    save_file(state | {name: state[name][:, :16].contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=rf"{name} has the shape \[64, 16, 3, 3\], .*says \[64, 32, 3, 3\]"):
        load_visual_tokenizer(tmp_path)
    save_file(state | {"quantize.power_vals": 2 ** torch.arange(6)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="power_vals is not the table of 6 rows whose first channel weighs most"):
        load_visual_tokenizer(tmp_path)
    save_file(state, tmp_path / "model.safetensors")
    rewrite(tmp_path, quantize={"codebook_dim": 5})
    with pytest.raises(InputError, match="z_channels 6 in the encoder and 6 in the decoder and codebook_dim 5"):
        load_visual_tokenizer(tmp_path)
    rewrite(tmp_path, **CONFIGS["magvitv2"] | {"encoder": CODER | {"attn_resolutions": [8]}})
    with pytest.raises(InputError, match="asks for attention at a resolution of 8, expected none"):
        load_visual_tokenizer(tmp_path)
    rewrite(tmp_path, encoder=CODER | {"attn_resolutions": [], "num_res_blocks": [1, 1]})
    with pytest.raises(InputError, match="blocks are given for 2 levels, expected 3"):
        load_visual_tokenizer(tmp_path)
    rewrite(tmp_path, encoder=CODER | {"attn_resolutions": [], "ch": 20})
    with pytest.raises(InputError, match="describes no tokenizer"):
        load_visual_tokenizer(tmp_path)


def test_a_codebook_of_another_size_is_named(tmp_path: Path):
    published("open_magvit2", tmp_path)
    settings = CONFIGS["open_magvit2"]["model"]["init_args"]
    rewrite(tmp_path, model={"init_args": settings | {"n_embed": 128}})
    with pytest.raises(InputError, match="z_channels 6, n_embed 128 and embed_dim 6, expected n_embed 64"):
        load_visual_tokenizer(tmp_path)
    rewrite(tmp_path, model={"init_args": settings | {"use_ema": True}})
    with pytest.raises(InputError, match=r"no averaged weights .* load it with averaged=False"):
        load_visual_tokenizer(tmp_path)
    rewrite(tmp_path, model={"init_args": settings | {"ddconfig": settings["ddconfig"] | {"in_channels": 1}}})
    with pytest.raises(InputError, match="in_channels 1, expected 3"):
        load_visual_tokenizer(tmp_path)
    published("lumina_vq", tmp_path)
    rewrite(tmp_path, num_vq_embeddings=32)
    with pytest.raises(InputError, match=r"quantize.embedding.weight has the shape \[64, 4\], .*says \[32, 4\]"):
        load_visual_tokenizer(tmp_path)
    rewrite(tmp_path, codebook=32)
    with pytest.raises(InputError, match="'codebook', which no VQModel knows"):
        load_visual_tokenizer(tmp_path)
    with pytest.raises(InputError, match="averaged is True, but the weights"):
        published("lumina_vq", tmp_path)
        load_visual_tokenizer(tmp_path, averaged=True)


class Opens:
    def __reduce__(self):
        return open, ("pwned", "w")


def test_broken_and_foreign_files_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    published("magvitv2", tmp_path / "a")
    path = tmp_path / "a" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match="broken or cut short"):
        load_visual_tokenizer(tmp_path / "a")
    path.unlink()
    with pytest.raises(InputError, match="has no weights"):
        load_visual_tokenizer(tmp_path / "a")
    torch.save({"state_dict": {"encoder": Opens()}}, tmp_path / "a" / "pytorch_model.bin")
    with pytest.raises(InputError, match="could run code"):
        load_visual_tokenizer(tmp_path / "a")
    assert not (tmp_path / "pwned").exists()
    rewrite(tmp_path / "a", _class_name="AutoencoderKL")
    with pytest.raises(InputError, match="no visual tokenizer that is known, its _class_name is 'AutoencoderKL'"):
        load_visual_tokenizer(tmp_path / "a")
    (tmp_path / "a" / "config.json").unlink()
    with pytest.raises(InputError, match=r"has no config\.json and 0 YAML files"):
        load_visual_tokenizer(tmp_path / "a")
    with pytest.raises(InputError, match="There is no directory"):
        load_visual_tokenizer(tmp_path / "nowhere")
