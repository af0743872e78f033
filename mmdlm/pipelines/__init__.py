"""Pictures from words, words from pictures, and either from parts of both, in diffusers' shape.

    pipe = TextToImage.from_pretrained()                       # the shipped model, or a directory
    pipe("a red apple", generator=torch.Generator().manual_seed(0)).images[0].save("apple.png")

One model directory serves every pipeline here: each prepares a canvas, denoises it and decodes it, and only which
places are editable differs.
"""

from mmdlm.pipelines.describing import ImageToText, TextsOutput
from mmdlm.pipelines.drawing import PicturesOutput, TextToImage
from mmdlm.pipelines.filling import Fill, FillOutput
from mmdlm.pipelines.pipeline import DEFAULT_PRESETS, Generators, MMDLMPipeline, StepCallback

__all__ = [
    "DEFAULT_PRESETS",
    "Fill",
    "FillOutput",
    "Generators",
    "ImageToText",
    "MMDLMPipeline",
    "PicturesOutput",
    "StepCallback",
    "TextToImage",
    "TextsOutput",
]
