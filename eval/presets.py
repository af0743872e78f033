"""Which sampling settings draw best? Compares settings of one model without asking the judge.

    mmdlm run eval/presets model=RUN/pipeline data=PICTURES concepts=300 styles=[twemoji] out=RUN/presets

A training caption and a style fix a scene to the pixel, so the render is the truth: every setting draws the same
training captions from the same seeds, and is measured by PSNR against the renders and by the share of codes equal to
the render's own. Held-out compositions and the judge are kept for `eval/pictures.py`. Prints a Markdown table and
writes presets.json.
"""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from mmdlm.data.scenes import PictureWorld
from mmdlm.pipelines import TextToImage
from mmdlm.training.arguments import config_from_arguments, run_program


@dataclass
class Config:
    """The grid of settings: every combination is tried."""

    model: str = ""
    data: str = ""
    out: str = "runs/presets"
    concepts: int | None = None
    styles: list[str] = field(default_factory=lambda: ["noto", "twemoji", "fluent_flat", "fluent_modern"])
    pictures: int = 64
    first_scene: int = 20_000_000
    seed: int = 0
    steps: list[int] = field(default_factory=lambda: [8, 16, 32])
    guidance_scales: list[float] = field(default_factory=lambda: [1.0, 1.5, 2.0])
    temperatures: list[float] = field(default_factory=lambda: [0.0, 0.5, 1.0])
    choice_temperatures: list[float] = field(default_factory=lambda: [0.0])


def main(arguments: list[str]) -> None:
    config = config_from_arguments(Config, arguments, program=__file__)
    pipeline = TextToImage.from_pretrained(config.model)
    pipeline.set_progress_bar_config(disable=True)
    size = pipeline.processor.image_size
    world = PictureWorld(config.data, concepts=config.concepts, styles=config.styles, resolution=size, split="train")
    scenes = [world.scene(config.first_scene + n) for n in range(config.pictures)]
    # With several styles the caption must name the one drawn, or the render would not be the only truth.
    prompts = [scene.captions[1] if len(config.styles) > 1 else scene.caption for scene in scenes]
    real = torch.from_numpy(np.stack([scene.image for scene in scenes])).movedim(-1, 1).float() / 127.5 - 1
    codes = pipeline.visual_tokenizer.encode(real)
    ceiling = psnr(pipeline.visual_tokenizer.decode(codes), real)

    rows = []
    grid = itertools.product(config.steps, config.guidance_scales, config.temperatures, config.choice_temperatures)
    for steps, scale, temperature, choice in grid:
        pipeline.presets["draw"] |= {
            "policy": {"name": "maskgit", "choice_temperature": choice},
            "draw": {"name": "categorical", "temperature": temperature},
        }
        generators = [torch.Generator().manual_seed(config.seed + n) for n in range(len(prompts))]
        started = time.monotonic()
        drawn = pipeline(
            prompts, num_inference_steps=steps, guidance_scale=scale, generator=generators, output_type="pt"
        )
        rows.append(
            {
                "steps": steps,
                "guidance_scale": scale,
                "temperature": temperature,
                "choice_temperature": choice,
                "psnr": round(psnr(drawn.images, real), 2),
                "codes_equal": round(float((drawn.codes == codes).float().mean()), 4),
                "seconds_a_picture": round((time.monotonic() - started) / len(prompts), 3),
            }
        )
        print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    rows.sort(key=lambda row: -row["psnr"])
    print(f"\nPSNR of the tokenizer's own reconstructions of these scenes: {ceiling:.2f} dB\n")
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    result = {"config": asdict(config), "reconstruction_psnr": ceiling, "torch": torch.__version__, "rows": rows}
    (out / "presets.json").write_text(json.dumps(result, indent=1))


def psnr(made: torch.Tensor, real: torch.Tensor) -> float:
    """Mean over pictures [B, 3, H, W] in [-1, 1] of the peak signal-to-noise ratio of 8-bit pixels, in dB."""
    error = ((made - real) * 127.5).round().pow(2).mean((1, 2, 3))
    return float((10 * torch.log10(255**2 / error.clamp_min(1e-3))).mean())


if __name__ == "__main__":
    run_program(main)
