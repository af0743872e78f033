"""Prompts to ids, pictures to pixels, and every kind of bad picture."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmdlm.errors import InputError
from mmdlm.processing import MMDLMProcessor, fit_square, load_image, to_levels
from mmdlm.text_tokenizer import SPECIAL_TOKENS, train_text_tokenizer

UNSEEN = ["日本語のりんご", "🍎🏳️‍🌈", "a\x00b\tc\r\n", "ﬃ é \u202e x", "  two  . ", "\U0010ffff\ufffd", "x" * 5000]


@pytest.fixture(scope="module")
def processor(tiny_model: Path) -> MMDLMProcessor:
    return MMDLMProcessor.from_pretrained(tiny_model / "processor")


@pytest.mark.parametrize("text", [*UNSEEN, "<|mask|> and <|eos|>", " <|draw|>", ""])
def test_any_text_comes_back_and_never_becomes_a_special_id(processor, text):
    ids = processor.text_ids(text)
    assert processor.tokenizer.decode(ids) == text
    assert all(len(SPECIAL_TOKENS) <= token < processor.vocabulary.text_size for token in ids)


def test_special_tokens_come_first_in_their_fixed_order(processor):
    assert processor.tokenizer.convert_ids_to_tokens(range(9)) == list(SPECIAL_TOKENS)


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(InputError, match="at least 265"):
        train_text_tokenizer(["a"], 264)


def test_text_stops_at_the_first_end(processor):
    eos, pad = processor.vocabulary.eos_id, processor.vocabulary.pad_id
    ids = [pad, *processor.text_ids("a red apple"), eos, *processor.text_ids("and more"), eos]
    assert processor.text(ids) == processor.text(torch.tensor(ids)) == "a red apple"
    assert processor.text([eos]) == ""


def test_text_that_is_no_unicode_is_refused(processor):
    with pytest.raises(InputError, match="not valid UTF-8 at character 2"):
        processor.text_ids("ab\udc80")


def test_a_processor_comes_back_from_disk_as_it_was(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = MMDLMProcessor.from_pretrained(tmp_path)
    assert again.vocabulary == processor.vocabulary
    assert again.image_size == processor.image_size == 16
    assert again.text_ids("two yellow stars") == processor.text_ids("two yellow stars")


def test_pixels_and_pictures_are_each_others_inverse(processor):
    levels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    pixels = processor.pixels([Image.fromarray(picture) for picture in levels])
    assert pixels.shape == (2, 3, 16, 16) and pixels.dtype == torch.float32
    assert pixels.min() >= -1 and pixels.max() <= 1
    assert pixels[0, 2, 3, 5].item() == pytest.approx(levels[0, 3, 5, 2] / 127.5 - 1, abs=1e-6)
    assert np.array_equal(np.stack([np.asarray(image) for image in processor.images(pixels)]), levels)


def test_a_wide_picture_is_kept_whole_on_the_colour_of_its_border(processor):
    wide = Image.new("RGB", (64, 32), (10, 200, 30))
    wide.paste((250, 0, 0), (24, 8, 40, 24))
    square = processor.images(processor.pixels(wide))[0]
    assert square.getpixel((8, 0)) == square.getpixel((8, 15)) == (10, 200, 30)
    assert square.getpixel((8, 8)) == pytest.approx((250, 0, 0), abs=8)


def test_the_centre_of_a_wide_picture_or_all_of_it_squashed(processor, tmp_path):
    # 16 rows are kept, and of 21 columns the 16 from round(2.5) = 2 on: half to even.
    columns = np.repeat([0, 120, 240], (7, 7, 7)).astype(np.uint8)
    wide = Image.fromarray(np.broadcast_to(columns[None, :, None], (16, 21, 3)).copy())
    cut = fit_square(wide, 16, "crop")
    assert np.array_equal(np.asarray(cut), np.asarray(wide)[:, 2:18])
    assert fit_square(wide, 16, "squash").getpixel((1, 0)) == (0, 0, 0)
    assert fit_square(wide.rotate(90, expand=True), 16, "crop").size == (16, 16)
    assert fit_square(wide.resize((5, 9)), 16, "crop").size == (16, 16)  # a small one is scaled up
    with pytest.raises(InputError, match="picture_fit is 'stretch', expected pad, crop or squash"):
        fit_square(wide, 16, "stretch")
    with pytest.raises(InputError, match="picture_fit is 'stretch'"):
        MMDLMProcessor(processor.tokenizer, processor.vocabulary, 16, "stretch")
    cropping = MMDLMProcessor(processor.tokenizer, processor.vocabulary, 16, "crop")
    cropping.save_pretrained(tmp_path)
    for again in (cropping, MMDLMProcessor.from_pretrained(tmp_path)):
        assert again.picture_fit == "crop" and np.array_equal(np.asarray(again.images(again.pixels(wide))[0]), cut)


def test_levels_are_rounded_or_cut():
    pixels = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 3.0]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert to_levels(pixels)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255, 255]
    assert to_levels(pixels, truncate=True)[0, 0, :, 0].tolist() == [0, 0, 127, 254, 255, 255]


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16", "CMYK"])
def test_every_mode_becomes_rgb(mode):
    if mode == "I;16":
        picture = Image.fromarray(np.full((4, 4), 0x8000, dtype=np.uint16))
        assert load_image(encoded(picture)).getpixel((0, 0)) == (128, 128, 128)
        return
    picture = Image.new("RGB", (4, 4), "white").convert(mode)
    assert load_image(encoded(picture, "TIFF" if mode == "CMYK" else "PNG")).getpixel((0, 0)) == (255, 255, 255)


def test_what_is_transparent_becomes_white_and_upside_down_is_turned():
    assert load_image(encoded(Image.new("RGBA", (2, 2), (0, 0, 0, 0)))).getpixel((0, 0)) == (255, 255, 255)
    turned = Image.new("RGB", (4, 2), "red")
    exif = turned.getexif()
    exif[0x0112] = 6
    assert load_image(encoded(turned, "JPEG", exif=exif)).size == (2, 4)


def giant_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be `width` x `height`."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body


def bad_pictures() -> dict[str, tuple[bytes, str]]:
    still = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    frames = {"save_all": True, "append_images": [Image.new("RGB", (64, 64), "blue")]}
    unfinished = encoded(still, "GIF")[:-1]  # without the byte that ends it: what follows begins a second frame
    return {
        "empty.png": (b"", "is empty"),
        "words.png": (b"this is no picture", "is no picture that can be read"),
        "page.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is no picture that can be read"),
        "cut.png": (encoded(still)[:2000], "broken or cut short"),
        "cut.jpg": (encoded(still, "JPEG")[:900], "broken or cut short"),
        "huge.png": (giant_png(10_000, 10_000), "expected at most 64 megapixels"),
        "bomb.png": (giant_png(60_000, 60_000), "expected at most 64 megapixels"),
        "cut.gif": (unfinished + b"!\xf9\x04", "broken or cut short"),
        "control.gif": (unfinished + b"!\xf9\x01\x00\x00", "broken or cut short"),
        "frame.gif": (unfinished + b",\x00\x00", "broken or cut short"),
        "moving.gif": (encoded(still, "GIF", **frames), "animated"),
        "moving.webp": (encoded(still, "WEBP", **frames), "animated"),
        "pages.tiff": (encoded(still, "TIFF", **frames), "several pages"),
        "script.eps": (encoded(still, "EPS"), "is no picture that can be read"),
        "float.tiff": (encoded(Image.new("F", (4, 4)), "TIFF"), "floating-point"),
    }


@pytest.mark.parametrize("name", bad_pictures())
def test_a_bad_picture_is_one_sentence(tmp_path, name):
    content, words = bad_pictures()[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words) as raised:
        load_image(tmp_path / name)
    assert name in str(raised.value) and "\n" not in str(raised.value)
    with pytest.raises(InputError, match=words):
        load_image(content)


@pytest.mark.filterwarnings("ignore")  # Pillow warns of every broken tag
@pytest.mark.parametrize("kind", [2, 5, 7, 12])  # text, a fraction, bytes, a double
def test_a_tiff_whose_numbers_are_of_another_kind_is_read_or_refused(kind):
    whole = encoded(Image.new("RGB", (4, 4), "red"), "TIFF")
    refused = 0
    for place in range(8, len(whole)):
        try:
            assert load_image(whole[:place] + bytes([kind]) + whole[place + 1 :]).mode == "RGB"
        except InputError:
            refused += 1
    assert refused


def test_a_hollow_avif_is_one_sentence():
    Image.init()
    if "AVIF" not in Image.SAVE:
        pytest.skip("this Pillow writes no AVIF")
    head, data = encoded(Image.linear_gradient("L"), "AVIF").split(b"mdat")
    with pytest.raises(InputError, match="broken or cut short"):
        load_image(head + b"mdat" + bytes(len(data)))


def test_a_path_that_is_no_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="no picture at"):
        load_image(tmp_path / "nothing.png")
    with pytest.raises(InputError, match="is no file"):
        load_image(tmp_path)


def test_a_still_gif_is_a_picture():
    assert load_image(encoded(Image.new("RGB", (3, 2), "red"), "GIF")).size == (3, 2)
