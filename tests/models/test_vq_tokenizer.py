"""The tokenizer with a learned codebook: nearest rows, the library's range of pixels, saving and loading."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from mmdlm.models.vq_tokenizer import VQTokenizer


@pytest.fixture(scope="module")
def tokenizer() -> VQTokenizer:
    torch.manual_seed(0)
    model = VQTokenizer(
        sample_size=16,
        block_out_channels=(32, 32),
        latent_channels=4,
        vq_embed_dim=3,
        num_vq_embeddings=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()
    torch.nn.init.normal_(model.vq.quantize.embedding.weight)
    return model


def pixels(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_a_code_is_the_nearest_row(tokenizer: VQTokenizer):
    wide = pixels(2, 3, 8, 12)
    latents, codes = tokenizer.latents(wide), tokenizer.encode(wide)
    assert latents.shape == (2, 3, 4, 6) and codes.shape == (2, 4, 6) and codes.dtype == torch.int64
    assert (tokenizer.downsample, tokenizer.codebook_size) == (2, 16)
    distances = (latents.movedim(1, -1).unsqueeze(-2) - tokenizer.vq.quantize.embedding.weight).pow(2).sum(-1)
    assert torch.equal(distances.argmin(-1), codes) and len(codes.unique()) > 1
    assert tokenizer.decode(codes).shape == wide.shape


def test_the_published_range_is_zero_to_one_and_ours_is_not(tokenizer: VQTokenizer):
    picture = pixels(1, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(tokenizer.latents(picture), tokenizer.vq.encode((picture + 1) / 2).latents)
        codes = tokenizer.encode(picture)
        published = tokenizer.vq.decode(codes, force_not_quantize=True, shape=(1, 4, 4, 3)).sample
    torch.testing.assert_close(tokenizer.decode(codes, clamp=False), published * 2 - 1)
    torch.testing.assert_close(tokenizer.decode(codes), published.clamp(0, 1) * 2 - 1)


def test_saving_and_loading_changes_nothing(tokenizer: VQTokenizer, tmp_path: Path):
    tokenizer.save_pretrained(tmp_path)
    again = VQTokenizer.from_pretrained(tmp_path)
    picture = pixels(1, 3, 8, 8)
    codes = tokenizer.encode(picture)
    assert torch.equal(again.encode(picture), codes) and torch.equal(again.decode(codes), tokenizer.decode(codes))


def test_wrong_input_is_an_error(tokenizer: VQTokenizer):
    with pytest.raises(ValueError, match="picture is 9 x 8 pixels, expected multiples of 2"):
        tokenizer.encode(pixels(1, 3, 8, 9))
    with pytest.raises(ValueError, match=r"image codes span \[-1, 16\], expected \[0, 15\]"):
        tokenizer.decode(torch.tensor([[[-1, 16]]]))


def test_half_precision_encodes_and_decodes(tokenizer: VQTokenizer):
    picture = pixels(1, 3, 8, 8)
    codes = tokenizer.encode(picture)
    half = copy.deepcopy(tokenizer).to(torch.bfloat16)
    assert float((half.encode(picture.to(torch.bfloat16)) == codes).float().mean()) > 0.7
    assert float((half.decode(codes).float() - tokenizer.decode(codes)).abs().max()) < 0.1
