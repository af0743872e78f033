"""Published models in the pipelines: a converted MMaDA reads what its released programs feed, and draws their codes."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mmdlm import prompts
from mmdlm.convert import convert, lumina_vq, magvitv2, mmada, visual
from mmdlm.errors import InputError
from mmdlm.models.vq_tokenizer import VQTokenizer
from mmdlm.pipelines import Fill, ImageToText, TextToImage
from mmdlm.pipelines.layouts import MMADA_CAPTION, check_own, draw_canvas, pad_id
from mmdlm.processing import MMDLMProcessor, fit_square
from mmdlm.sampling.denoise import denoise
from mmdlm.sampling.draws import greedy
from mmdlm.sampling.policies import maskgit
from mmdlm.sampling.published import rounded_counts

RECORDED = Path(__file__).parent.parent / "parity" / "recorded" / "mmada-t2i"
# The recorded model's vocabulary: words 0 to 199, these, three more words, and image codes from 220 on.
SPECIAL = [
    "<|soi|>", "<|eoi|>", "<|sov|>", "<|eov|>", "<|t2i|>", "<|mmu|>", "<|t2v|>", "<|v2v|>", "<|lvg|>", "[iPAD]",
    "<|r2i|>", "<bos>", "<eos>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<mask>",
]  # fmt: skip
WORDS = [f"w{number}" for number in range(200)] + SPECIAL + ["\n", "user", "assistant"]
GIVEN = {"bos_id": 211, "boi_id": 200, "eoi_id": 201, "draw_id": 204, "describe_id": 205, "ask_id": 205}
IDS = prompts.MMaDAIds(
    bos=211, eos=212, mask=216, start_header=213, end_header=214, eot=215, soi=200, eoi=201, t2i=204, mmu=205,
    left_pad=209, r2i=210,
)  # fmt: skip
CODER = {"ch": 32, "ch_mult": [1, 1, 1], "num_res_blocks": [1, 1, 1], "resolution": 16, "z_channels": 6}
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8))


def said(ids) -> str:
    return " ".join(WORDS[number] for number in ids)


def save_words(directory: Path) -> None:
    """A text tokenizer of the recorded vocabulary: one id for a word, one for a line's end."""
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("\n"), "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<bos>", eos_token="<eos>", additional_special_tokens=["<|eot_id|>"]
    ).save_pretrained(directory)


def save_visual(module, config: dict, directory: Path) -> Path:
    """A visual tokenizer of random weights in its published format: 64 codes, 4 x 4 pixels each."""
    torch.manual_seed(0)
    state = {name: value.contiguous() for name, value in module.from_mmdlm(module.build(config).state_dict()).items()}
    for name, value in state.items():
        if value.ndim > 1 and not name.startswith("quantize.embedding"):
            value.normal_(std=0.1)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    save_file(state, directory / "model.safetensors")
    return directory


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The recorded MMaDA, converted with a text tokenizer and a magvitv2 into a whole model directory."""
    place = tmp_path_factory.mktemp("published")
    shutil.copytree(RECORDED, place / "mmada")
    save_words(place / "mmada")
    config = {"_class_name": "MAGVITv2", "encoder": CODER, "decoder": CODER, "quantize": {"codebook_dim": 6}}
    eyes = save_visual(magvitv2, config, place / "magvitv2")
    return convert(place / "mmada", place / "whole", visual_tokenizer=eyes, vocabulary=GIVEN)


@pytest.fixture(scope="module")
def draw(whole):
    pipe = TextToImage.from_pretrained(whole)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def tell(whole):
    pipe = ImageToText.from_pretrained(whole)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def handed(monkeypatch):
    """handed(pipe) -> the list of what the model is called with from now on: (ids [B, L], attention mask)."""

    def watch(pipe):
        calls, forward = [], pipe.model.forward

        def noted(ids, *, attention_mask=None, **inputs):
            calls.append((ids, attention_mask))
            return forward(ids, attention_mask=attention_mask, **inputs)

        monkeypatch.setattr(pipe.model, "forward", noted)
        return calls

    return watch


def test_a_prompt_becomes_the_ids_that_mmada_is_fed(draw, handed):
    calls = handed(draw)
    texts = [[5, 17, 3], [8], [1, 2, 3, 4, 5, 6]]
    draw._first_pass.clear()  # another run's would be used
    out = draw([said(text) for text in texts], num_inference_steps=2, guidance_scale=2.0)
    assert [picture.size for picture in out.images] == [(16, 16)] * 3 and out.codes.shape == (3, 4, 4)
    masks = torch.full((3, 16), 216)
    expected = prompts.mmada_t2i(texts, masks, max_text_length=8, ids=IDS)
    ids, mask = calls[0]
    assert torch.equal(ids, expected.ids) and torch.equal(mask, expected.valid[:, None, None])
    # The empty prompt has nothing to be padded for, and before anything is drawn its rows are one.
    bare = prompts.mmada_t2i([[]] * 3, masks, max_text_length=2, ids=IDS).ids
    ids, mask = calls[1]
    assert torch.equal(ids, bare[:1]) and torch.equal(bare, bare[:1].expand(3, -1)) and mask is None
    assert calls[3][0].shape == bare.shape


@pytest.mark.parametrize("run", ["cfg", "nocfg"])
def test_words_become_the_codes_that_mmada_drew(draw, run):
    arguments = json.loads((RECORDED / "case.json").read_text())["runs"][run]
    tensors = load_file(RECORDED / "case.safetensors")
    recorded = {name.removeprefix(f"{run}."): value for name, value in tensors.items() if name.startswith(f"{run}.")}
    # The recorded program cuts a text that has no room beside bos and eos; here it would be an error.
    words = [said(row[row >= 0][: arguments["max_text_len"] - 2].tolist()) for row in recorded["text_ids"]]
    canvas, predict, _ = draw.prepare(words, 1, arguments["guidance_scale"] + 1)
    for ours, theirs, seen in zip(canvas.ids, recorded["input_ids"], recorded["attention_mask"].bool(), strict=True):
        assert ours[ours != IDS.left_pad].tolist() == theirs[seen].tolist()
    *_, last = denoise(
        predict,
        canvas.ids,
        maskgit(choice_temperature=0.0, keep=rounded_counts(arguments["schedule"], 16)),
        editable=canvas.editable,
        mask_id=216,
        steps=arguments["timesteps"],
        draw=greedy,
        first_id=220,
    )
    assert torch.equal(last.x[canvas.editable].view(-1, 16) - 220, recorded["final_codes"])


def test_a_question_becomes_the_ids_that_mmada_is_fed(tell, handed):
    calls = handed(tell)
    answers = tell([PICTURE, PICTURE], [said([4, 9, 30]), said([7])], num_inference_steps=2)
    length = tell.presets["ask"]["answer_length"]
    assert answers.ids.shape == (2, length)
    codes = tell.visual_tokenizer.encode(tell.processor.pixels(PICTURE)).flatten(1).expand(2, -1)
    assert len(codes.unique()) > 1
    header = [[213, WORDS.index(role), 214, WORDS.index("\n")] for role in ("user", "assistant")]
    chats = [[211, *header[0], *words, 215, *header[1]] for words in ([4, 9, 30], [7])]
    expected = prompts.mmada_question(chats, codes + 220, ids=IDS)
    ids, mask = calls[0]
    assert torch.equal(ids[:, :-length], expected.ids) and bool((ids[:, -length:] == 216).all())
    assert torch.equal(mask[:, 0, 0, :-length], expected.valid) and bool(mask[..., -length:].all())


def test_a_caption_is_asked_for(tell, handed):
    calls = handed(tell)
    length = tell.presets["describe"]["answer_length"]
    tell(PICTURE, num_inference_steps=1)
    chat = prompts.chat([{"role": "user", "content": MMADA_CAPTION}], tell.processor.text_ids, ids=IDS, newline="\n")
    assert calls[0][0][0, 1 + 16 + 2 : -length].tolist() == chat and calls[0][1] is None


def test_pictures_are_cut_as_mmada_cuts_them(whole, tell):
    assert json.loads((whole / "processor" / "processor_config.json").read_text())["picture_fit"] == "crop"
    cut = np.asarray(fit_square(PICTURE, 16, "crop"), dtype=np.float32)
    assert torch.equal(tell.processor.pixels(PICTURE)[0].permute(1, 2, 0), torch.from_numpy(cut) / 127.5 - 1)


def test_too_long_a_prompt_and_what_no_published_model_learned(draw, whole):
    with pytest.raises(InputError, match="too long by 3 tokens, MMaDA was trained with at most 512"):
        draw(said([1] * 513))
    with pytest.raises(InputError, match="no layout for filling here"):
        Fill.from_pretrained(whole)(said([1]))
    for family in ("llada", "lumina"):
        with pytest.raises(InputError, match=f"family {family}, for which there is no layout for drawing"):
            check_own(family, replace(draw.model.vocabulary, draw_id=-1), "drawing")


def test_the_published_size_has_the_published_ids(draw):
    vocabulary = mmada.configuration(mmada.PUBLISHED_CONFIG).shared_vocabulary
    processor = MMDLMProcessor(draw.processor.tokenizer, vocabulary, 512, "crop")
    canvas = draw_canvas(said([5, 6]), (32, 32), processor, "mmada")
    expected = prompts.mmada_t2i([[5, 6]], torch.full((1, 1024), 126336), max_text_length=4, ids=prompts.MMaDAIds())
    assert canvas.ids[:6].tolist() == [126088, 126080, 5, 6, 126081, 126084]
    assert torch.equal(canvas.ids, expected.ids[0])
    assert canvas.grid[6:38].tolist() == [[0, column] for column in range(32)] and int(canvas.editable.sum()) == 1024
    assert pad_id(processor, "mmada") == 126093


def test_ids_that_a_small_mmada_does_not_say(whole, tmp_path):
    source = whole.parent
    bare = convert(source / "mmada", tmp_path / "bare", visual_tokenizer=source / "magvitv2")
    with pytest.raises(InputError, match="its id of bos, soi, eoi, t2i is unknown: convert it again with --id"):
        TextToImage.from_pretrained(bare)(said([1]))


def test_a_learned_codebook_is_a_visual_tokenizer_too(whole, tmp_path):
    config = {
        "_class_name": "VQModel",
        "block_out_channels": [32, 32, 32],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "latent_channels": 4,
        "num_vq_embeddings": 64,
        "sample_size": 16,
        "lookup_from_codebook": True,
    }
    eyes = save_visual(lumina_vq, config, tmp_path / "vq")
    assert isinstance(visual.load_visual_tokenizer(eyes), VQTokenizer)
    made = convert(whole.parent / "mmada", tmp_path / "made", visual_tokenizer=eyes, vocabulary=GIVEN)
    said_so: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: said_so.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("diffusers.pipelines.pipeline_utils")
    log.addHandler(listener)
    try:
        pipe = TextToImage.from_pretrained(made)
    finally:
        log.removeHandler(listener)
    assert isinstance(pipe.visual_tokenizer, VQTokenizer)
    assert not [line for line in said_so if "Expected types" in line]
    assert "picture_fit" not in json.loads((made / "processor" / "processor_config.json").read_text())


def test_words_and_pictures_are_scored_in_mmadas_layouts(tell, handed):
    from mmdlm.evaluation.scoring import picture_given_words, words_given_picture

    codes = torch.arange(16).view(4, 4)
    canvas = tell.answer_canvas(codes, None, 4, [5, 17])
    # what is judged stands where an answer is found, filled up with eos
    given = tell.prepare(PICTURE, None, 4)[0]
    assert canvas.ids[canvas.editable].tolist() == [5, 17, IDS.eos, IDS.eos]
    assert torch.equal(canvas.editable, given.editable[0]) and len(canvas.ids) == len(given.ids[0])
    picture = tell.draw_canvas(said([5, 17]), codes)
    assert torch.equal(tell.processor.vocabulary.image_codes(picture.ids[picture.editable]), codes.flatten())
    calls = handed(tell)
    texts = [said([5, 17]), said([8])]
    found = words_given_picture(tell, texts, codes.expand(2, -1, -1), samples=2, seed=0)
    assert (found.nats > 0).all() and (calls[0][0] == IDS.mmu).any()
    found = picture_given_words(tell, texts, codes.expand(2, -1, -1), samples=2, seed=0)
    assert (found.nats > 0).all() and found.tokens.tolist() == [16, 16]
    with pytest.raises(InputError, match="An answer has 4 tokens"):
        tell.answer_canvas(codes, None, 4, [1, 2, 3, 4])
