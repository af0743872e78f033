"""What spoils a run in silence is refused, or said, in one sentence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mmdlm.assets import shipped_model
from mmdlm.data.coded import CodedScenes
from mmdlm.errors import InputError
from mmdlm.models.mask_predictor import MaskPredictor
from mmdlm.pipelines import TextToImage
from mmdlm.processing import MMDLMProcessor
from mmdlm.training import traps
from mmdlm.training.masked_loss import NoiseSettings, corrupt
from mmdlm.training.rows import Pool, Rows, RowSettings


@pytest.fixture(scope="module")
def shipped() -> tuple[MaskPredictor, MMDLMProcessor]:
    model = MaskPredictor.from_pretrained(shipped_model() / "model").eval()
    return model, MMDLMProcessor.from_pretrained(shipped_model() / "processor")


CAPTIONS = ["a red apple on a green background", "two yellow bananas", "a cat to the left of a dog", "a blue house"]
KNOWN = ["a red apple on a white background", "a yellow banana on a blue background", "a tree", "four roses"]


def rows(processor: MMDLMProcessor, captions: list[str] = CAPTIONS, codes: Tensor | None = None, **settings) -> Rows:
    size = processor.vocabulary.image_size
    if codes is None:
        codes = torch.randint(size, (len(captions), 16, 16), generator=torch.Generator().manual_seed(0))
    coded = CodedScenes(codes, [[text] for text in captions], [[] for _ in captions], ["pair"] * len(captions))
    made = RowSettings(**({"caption_length": 24} | settings))
    return Rows([Pool("mine", coded)], made, text_ids=processor.text_ids, vocabulary=processor.vocabulary)


def test_a_run_without_a_trap_is_told_nothing(shipped):
    model, processor = shipped
    mask = processor.tokenizer.mask_token_id
    settings = {"tokenizer_mask_id": mask, "guidance_scale": 1.5, "fresh": False}
    assert traps.warnings(rows(processor), NoiseSettings(), model, **settings) == []


def test_a_wrong_mask_id(shipped):
    _, processor = shipped
    made, vocabulary = rows(processor), processor.vocabulary
    ids = made.batch(0, 8).canvas.ids
    with pytest.raises(InputError, match=r"mask_id is 1, but the text tokenizer's mask token has the id 5: write that"):
        traps.check_mask_id(vocabulary, 5, made.pools, ids)
    ids[3, 4] = vocabulary.mask_id
    with pytest.raises(InputError, match="stands in the rows of mine before anything is masked"):
        traps.check_mask_id(vocabulary, None, made.pools, ids)


@pytest.mark.parametrize(("settings", "guidance", "sentence"), [
    ({"captions": ["a thing"] * 3}, 1.0, "All 3 pictures of mine have the same caption 'a thing'"),
    ({"prompt_dropout": 0.0}, 1.5, "prompt_dropout is 0 and pictures are drawn with guidance_scale 1.5"),
])  # fmt: skip
def test_words_that_teach_nothing(shipped, settings: dict, guidance: float, sentence: str):
    made = rows(shipped[1], **settings)
    [found] = traps.word_warnings(made.pools, made.settings, guidance_scale=guidance, fresh=False)
    assert sentence in found and found.endswith(".")
    with pytest.raises(InputError, match=sentence):
        traps.word_warnings(made.pools, made.settings, guidance_scale=guidance, fresh=True)
    assert traps.word_warnings(made.pools[:0], RowSettings(prompt_dropout=0.0), guidance_scale=1.0, fresh=True) == []


class Late(nn.Module):
    """A predictor whose logits come one place late: what a model born autoregressive does without its offset."""

    def __init__(self, model: MaskPredictor, by: int):
        super().__init__()
        self.model, self.by, self.vocabulary = model, by, model.vocabulary

    def forward(self, ids: Tensor, *, where: Tensor, **kwargs):
        return self.model(ids, where=(where - self.by).clamp(0, ids.shape[1] - 1), **kwargs)


def test_shifted_labels(shipped):
    model, processor = shipped
    pipe = TextToImage.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    images = pipe(KNOWN, generator=torch.Generator().manual_seed(0), num_inference_steps=4).images
    codes = pipe.visual_tokenizer.encode(processor.pixels(images))
    made = rows(processor, KNOWN, codes, draw_share=0.0, describe_share=1.0)
    noise = torch.Generator().manual_seed(1)
    noised = corrupt(*made.batch(0, 40), mask_id=made.vocabulary.mask_id, settings=NoiseSettings(), generator=noise)
    found = traps.check_alignment(model, noised)
    assert found[0] < found[1] - 0.5 and found[0] < found[-1] - 0.5
    with pytest.raises(InputError, match="predicts the token before each place better"):
        traps.check_alignment(Late(model, 1), noised)
    with pytest.raises(InputError, match="predicts the token after each place better"):
        traps.check_alignment(Late(model, -1), noised)
    torch.manual_seed(0)
    config = type(model.config)(**(model.config.to_dict() | {"image_fold": 1}))
    traps.check_alignment(MaskPredictor(config), noised)  # random weights show nothing
