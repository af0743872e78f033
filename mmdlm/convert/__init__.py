"""Published models as ours: recognised by their config.json, read shard by shard, never by running their code.

    model = load_predictor("GSAI-ML/LLaDA-8B-Instruct", dtype=torch.bfloat16, device_map="cuda")

One module per family maps its configuration (`configuration`) and names its tensors (`pieces`); the rest is common. The
model is the library's own `MaskPredictor` over a decoder of transformers, so there is no modelling file per family.
"""

from __future__ import annotations

from mmdlm.convert.families import FAMILIES as FAMILIES
from mmdlm.convert.families import configuration as configuration
from mmdlm.convert.families import from_mmdlm as from_mmdlm
from mmdlm.convert.families import recognise as recognise
from mmdlm.convert.families import to_mmdlm as to_mmdlm
from mmdlm.convert.predictor import load_predictor as load_predictor
from mmdlm.convert.predictor import predictor_config as predictor_config
from mmdlm.convert.visual import load_visual_tokenizer as load_visual_tokenizer
from mmdlm.convert.writing import convert as convert
from mmdlm.convert.writing import write_published as write_published
