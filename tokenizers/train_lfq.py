"""Trains the visual tokenizer: pictures -> codes -> pictures, top to bottom.

    mmdlm run tokenizers/train_lfq --config pictures_f4 data=PICTURES out=RUN
    mmdlm run tokenizers/train_lfq --config f8_13 data=FOLDER out=RUN [init_from=RUN/visual_tokenizer]
    torchrun --nproc_per_node 2 "$(mmdlm path tokenizers/train_lfq)" --config pictures_f4 data=PICTURES out=RUN

`data` is a picture world, or any pictures: a folder, parquet, tars, a name on the Hub, with captions or without. With
`init_from` training goes on from a saved tokenizer, whose shape is then the model's; `grow={codebook_bits: 13}` adds
bits or blocks, and `keep_codes_weight` holds the first bits of every code at what they were.

The loss is MAGVIT-v2's (arXiv 2310.05737, equation 5 and section 3.1): reconstruction + commitment + per-sample entropy
- codebook entropy, and, after a warm start, an adversarial term weighed as in VQGAN (arXiv 2012.09841, equation 7).
A run directory holds checkpoints (resumable), metrics.jsonl, curves.png, sheets of held-out pictures beside their
reconstructions, `codes-<step>.png` (the use of every code), and at the end `visual_tokenizer/`, the averaged weights as
`LFQTokenizer.from_pretrained` reads them.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from mmdlm import __version__
from mmdlm.config import save_config
from mmdlm.data.picture_batches import Batches, open_batches
from mmdlm.errors import InputError
from mmdlm.model_directory import whole_directory
from mmdlm.models.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    lecam,
    warm_start,
)
from mmdlm.models.growing import GROWING, grow_tokenizer
from mmdlm.models.visual_tokenizer import LFQTokenizer, saved_tokenizer
from mmdlm.picture_files import png, write_whole
from mmdlm.training.arguments import config_from_arguments, run_program
from mmdlm.training.checkpoints import WeightAverage, check_same_weights, disk_guard, load_checkpoint, save_checkpoint
from mmdlm.training.codebook import advice, draw_dashboard, use_of_codes
from mmdlm.training.interrupts import StopRequest
from mmdlm.training.processes import largest
from mmdlm.training.run_log import RunLog, plot_curves

ADVISED = ("sample_entropy", "codebook_entropy", "commitment")
# What may be changed of a tokenizer that training goes on with: it shapes the loss and no weight.
LOSS_SETTINGS = ("busy_entropy", "entropy_temperature", "entropy_group_bits")


@dataclass
class Model:
    """Arguments of LFQTokenizer."""

    sample_size: int = 64
    codebook_bits: int = 10
    encoder_widths: list[int] = field(default_factory=lambda: [64, 128])
    decoder_widths: list[int] = field(default_factory=lambda: [64, 128])
    encoder_blocks: int | list[int] = 2
    decoder_blocks: int | list[int] = 2
    stem_patch: int = 2
    cell_encoder: bool = False
    busy_entropy: bool = False
    code_modulation: bool = False
    quantizer: str = "lfq"
    fsq_levels: list[int] | None = None
    entropy_temperature: float = 0.01
    entropy_group_bits: int | None = None
    bit_order: str = "big"
    layout: str = "patched"
    stem_width: int | None = None
    code_factors: list[int] | None = None


@dataclass
class Config:
    """Everything a run depends on; a YAML states what differs from these defaults."""

    data: str = ""
    out: str = "runs/tokenizer"
    init_from: str | None = None
    grow: dict[str, int] = field(default_factory=dict)  # of GROWING, what init_from shall have more of
    train_encoder: bool = True
    held_out_share: float = 0.1
    picture_fit: str = "pad"
    concepts: int | None = None
    styles: list[str] = field(default_factory=lambda: ["noto", "twemoji", "fluent_flat", "fluent_modern"])
    model: Model = field(default_factory=Model)
    seed: int = 0
    train_batch_size: int = 16
    max_train_steps: int = 10_000
    learning_rate: float = 1e-3
    lr_warmup_steps: int = 100
    lr_end: float = 0.02
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    mixed_precision: str | bool = "no"  # YAML reads a bare no as false
    l1_weight: float = 0.2
    l2_weight: float = 1.0
    gradient_weight: float = 0.2
    commitment_weight: float = 0.05
    keep_codes_weight: float = 0.0
    sample_entropy_weight: float = 0.01
    codebook_entropy_weight: float = 0.02
    entropy_anneal_steps: int = 500
    perceptual_weight: float = 0.0
    perceptual_model: str | None = None
    adversarial_weight: float = 0.0
    adversarial_start: int = 5_000
    adversarial_ramp: int = 500
    lecam_weight: float = 0.001
    ema_decay: float = 0.999
    checkpointing_steps: int = 500
    checkpoints_total_limit: int = 2
    logging_steps: int = 50
    validation_steps: int = 500
    validation_pictures: int = 256
    resume_from_checkpoint: str | None = "latest"


class Criterion:
    """Reconstruction terms over pixels in [-1, 1]: L1, L2, differences at three scales, optionally timm features."""

    def __init__(self, config: Config, device: torch.device):
        self.config = config
        self.features = None
        if config.perceptual_weight > 0:
            from mmdlm.training.perceptual import PerceptualDistance

            self.features = PerceptualDistance(config.perceptual_model).to(device)

    def __call__(self, made: Tensor, real: Tensor) -> Tensor:
        c = self.config
        loss = c.l1_weight * F.l1_loss(made, real) + c.l2_weight * F.mse_loss(made, real)
        if c.gradient_weight:
            loss = loss + c.gradient_weight * gradient_distance(made, real)
        if self.features is not None:
            loss = loss + c.perceptual_weight * self.features(made, real)
        return loss


def gradient_distance(made: Tensor, real: Tensor, scales: int = 3) -> Tensor:
    """Mean L1 distance of horizontal and vertical differences at halving scales: keeps edges sharp without a GAN."""
    total = made.new_zeros(())
    error = made - real
    for _ in range(scales):
        total = total + error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        error = F.avg_pool2d(error, 2)
    return total / scales


def shape_of(config: Config) -> Model:
    """The model's settings: those of the YAML, or with `init_from` that tokenizer's, of which LOSS_SETTINGS may differ
    and which may `grow`.

    Raises InputError where the YAML states another shape than `init_from` has, and for what cannot grow.
    """
    if not config.init_from:
        if config.grow:
            raise InputError("grow is given without init_from: name the tokenizer that is to grow.")
        return config.model
    if not (Path(config.init_from) / "config.json").is_file():
        raise InputError(f"init_from is {config.init_from}, expected a saved tokenizer with its config.json: check it.")
    saved = LFQTokenizer.load_config(config.init_from)
    if saved.get("_class_name", "LFQTokenizer") != "LFQTokenizer":
        raise InputError(f"{config.init_from} holds a {saved['_class_name']}, expected an LFQTokenizer to go on with.")
    found, stated, usual = {}, asdict(config.model), asdict(Model())
    for name, value in stated.items():
        known = saved.get(name, usual[name])
        found[name] = value if name in LOSS_SETTINGS and value != usual[name] else known
        if name not in LOSS_SETTINGS and value not in (usual[name], known):
            raise InputError(f"model.{name} is {value}, but {config.init_from} has {known}: leave model.{name} out.")
    if config.grow and (found["layout"], found["quantizer"]) != ("patched", "lfq"):
        what = f"the layout {found['layout']} and the quantizer {found['quantizer']}"
        raise InputError(f"{config.init_from} has {what}, expected patched and lfq to grow: leave grow out.")
    for name, value in config.grow.items():
        if name not in GROWING or value < found[name]:
            raise InputError(f"grow has {name}: {value}, expected {', '.join(GROWING)}, none less than it is now.")
        found[name] = value
    return replace(config.model, **found)


def learning_rate(config: Config, step: int) -> float:
    """Linear warm-up, then cosine down to `lr_end` times the peak."""
    if step < config.lr_warmup_steps:
        return config.learning_rate * (step + 1) / config.lr_warmup_steps
    share = (step - config.lr_warmup_steps) / max(config.max_train_steps - config.lr_warmup_steps, 1)
    return config.learning_rate * (
        config.lr_end + (1 - config.lr_end) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
    )


@torch.no_grad()
def validate(
    model: LFQTokenizer, batches: Batches, count: int, device: torch.device
) -> tuple[dict[str, float], Tensor, Image.Image]:
    """PSNR in dB over 8-bit pictures (mean of per-picture values), use of the codes; how often each came; 16 pairs."""
    model.eval()
    real = batches.batch(range(min(count, batches.size or count)))
    used = torch.zeros(model.codebook_size, device=device)
    made = []
    for batch in real.split(64):
        codes = model.encode(batch.to(device))
        used += torch.bincount(codes.flatten(), minlength=model.codebook_size)
        made.append(model.decode(codes).cpu())
    model.train()
    rebuilt = torch.cat(made)
    error = ((rebuilt + 1).mul(127.5).round() - (real + 1).mul(127.5).round()).pow(2).mean((1, 2, 3))
    psnr = (20 * math.log10(255) - 10 * error.clamp_min(1e-3).log10()).mean()
    return {"psnr": float(psnr), **use_of_codes(used)}, used, sheet(real[:16], rebuilt[:16])


def sheet(real: Tensor, rebuilt: Tensor) -> Image.Image:
    """Originals above their reconstructions, eight pairs a row, twice enlarged."""
    rows = [torch.cat(list(part[at : at + 8]), dim=-1) for at in range(0, len(real), 8) for part in (real, rebuilt)]
    image = Image.fromarray(torch.cat(rows, dim=-2).add(1).mul(127.5).round().byte().movedim(0, -1).numpy())
    return image.resize((image.width * 2, image.height * 2), Image.Resampling.NEAREST)


def main(arguments: list[str]) -> None:
    config = config_from_arguments(Config, arguments, program=__file__)
    torch.manual_seed(config.seed)
    accelerator = Accelerator(mixed_precision=config.mixed_precision or "no")
    with disk_guard(Path(config.out)), StopRequest() as stop:
        train(config, accelerator, stop)
    accelerator.end_training()


def train(config: Config, accelerator: Accelerator, stop: StopRequest) -> None:
    device, rank, world_size = accelerator.device, accelerator.process_index, accelerator.num_processes
    out = Path(config.out)
    config.model = shape_of(config)
    pictures, held_out = open_batches(
        config.data, side=config.model.sample_size, held_out_share=config.held_out_share, seed=config.seed,
        fit=config.picture_fit, world={"concepts": config.concepts, "styles": config.styles},
    )  # fmt: skip

    try:
        model = LFQTokenizer(**vars(config.model))
    except ValueError as error:
        raise InputError(f"No tokenizer can be made of these settings of model: {error}") from error
    bits = config.model.codebook_bits if config.model.quantizer == "lfq" else None
    known = saved_tokenizer(config.init_from) if config.init_from else None
    if known:
        grow_tokenizer(known, model) if config.grow else model.load_state_dict(known.state_dict())
        known = known.to(device) if config.keep_codes_weight else None
    # With a frozen encoder the codes stay what they are: a decoder can be improved under a predictor trained on them.
    model.encoder.requires_grad_(config.train_encoder)
    average = WeightAverage(model, config.ema_decay)
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], betas=(0.9, 0.95), weight_decay=config.weight_decay
    )
    criterion = Criterion(config, device)
    discriminator = PatchDiscriminator() if config.adversarial_weight else None
    judge_optimizer = torch.optim.AdamW(discriminator.parameters(), betas=(0.5, 0.9)) if discriminator else None
    score_means = torch.zeros(2, device=device)  # moving averages of the real and the fake score (LeCAM)
    came = torch.zeros(model.codebook_size, device=device)  # how often each code came since the last report

    step = 0
    restored = load_checkpoint(out, config.resume_from_checkpoint) if config.resume_from_checkpoint else None
    if restored:
        weights, state, meta = restored
        expected = {"model": model.state_dict(), "average": average.state}
        expected |= {"discriminator": discriminator.state_dict()} if discriminator else {}
        check_same_weights(weights, expected, out)
        model.load_state_dict(weights["model"])
        average.state = weights["average"]
        optimizer.load_state_dict(state["optimizer"])
        score_means = state["score_means"].to(device)
        step = meta["step"]
        if accelerator.is_main_process and "came" in state:
            came += state["came"].to(device)
        if discriminator and judge_optimizer:
            discriminator.load_state_dict(weights["discriminator"])
            judge_optimizer.load_state_dict(state["judge_optimizer"])
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    if discriminator:
        discriminator, judge_optimizer = accelerator.prepare(discriminator, judge_optimizer)
    log = RunLog(out, step=step, enabled=accelerator.is_main_process)
    if accelerator.is_main_process:
        save_config(config, out / "config.yaml")

    wrapped.train()
    clock, seen = time.monotonic(), 0
    while step < config.max_train_steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        # A batch is a pure function of step and rank, so that a resumed run sees what the uninterrupted one would have.
        first = (step * world_size + rank) * config.train_batch_size
        real = pictures.batch(range(first, first + config.train_batch_size))
        real = real.to(device, memory_format=torch.channels_last)

        with accelerator.autocast():
            made, quantized = wrapped(real)
        reconstruction = criterion(made.float(), real)
        loss = reconstruction + config.commitment_weight * quantized.commitment
        numbers = {"reconstruction": reconstruction, "commitment": quantized.commitment}
        if known:  # the straight-through gradient of wrong signs alone, as a perceptron's
            kept = known.quantize.vectors(known.encode(real))
            numbers["keep_codes"] = F.mse_loss(quantized.vectors[:, : kept.shape[1]].float(), kept)
            loss = loss + config.keep_codes_weight * numbers["keep_codes"]
        came += torch.bincount(quantized.codes.flatten(), minlength=len(came))
        if quantized.entropies is not None and config.train_encoder:
            strength = max(1.0, 4.0 * (1 - step / max(config.entropy_anneal_steps, 1)))
            single, whole = quantized.entropies.per_sample, quantized.entropies.codebook
            numbers |= {"sample_entropy": single, "codebook_entropy": whole}
            # As it enters the loss: single codes shall be sure (+), the codebook evenly used (-).
            weight = strength * config.codebook_entropy_weight
            numbers["entropy_term"] = config.sample_entropy_weight * single - weight * whole
            loss = loss + numbers["entropy_term"]
        gate = warm_start(step, start=config.adversarial_start, ramp=config.adversarial_ramp)
        if discriminator and gate:
            adversarial = generator_loss(discriminator(made))
            weight = adaptive_weight(reconstruction, adversarial, model.decoder.out.weight)
            loss = loss + config.adversarial_weight * gate * weight * adversarial
            numbers |= {"adversarial": adversarial}
        optimizer.zero_grad(set_to_none=True)
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(wrapped.parameters(), config.max_grad_norm)
        optimizer.step()
        average.update(model, step)

        if discriminator and judge_optimizer and gate:
            for group in judge_optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            scores, fakes = discriminator(real), discriminator(made.detach())
            judged = discriminator_loss(scores, fakes) + config.lecam_weight * lecam(scores, fakes, *score_means)
            judge_optimizer.zero_grad(set_to_none=True)
            accelerator.backward(judged)
            judge_optimizer.step()
            with torch.no_grad():
                # The mean over all processes, so that the one that is saved is every process's.
                score_means.lerp_(accelerator.reduce(torch.stack([scores.mean(), fakes.mean()]), "mean"), 0.01)
            numbers |= {"discriminator": judged}

        step += 1
        seen += config.train_batch_size * world_size
        if not math.isfinite(float(loss.detach())):
            raise SystemExit(
                f"the loss became {float(loss.detach())} at step {step}: lower learning_rate or max_grad_norm; "
                f"the last checkpoint in {out} is whole"
            )
        if step % config.logging_steps == 0:
            # Of all processes together: each sees its own pictures only.
            use = use_of_codes(accelerator.reduce(came, "sum"))
            came.zero_()
            log.write(
                step,
                loss=float(loss.detach()),
                gradient_norm=float(norm),
                learning_rate=optimizer.param_groups[0]["lr"],
                pictures_per_second=seen / (time.monotonic() - clock),
                **{k: float(v.detach()) for k, v in numbers.items()},
                **{f"train_{name}": value for name, value in use.items()},
            )
        last, stopped = step == config.max_train_steps, bool(largest(accelerator, [stop.asked])[0])
        saves = step % config.checkpointing_steps == 0 or last or stopped
        if accelerator.is_main_process and (step % config.validation_steps == 0 or last):
            averaged = LFQTokenizer(**vars(config.model)).to(device)
            averaged.load_state_dict({**model.state_dict(), **average.state})  # what is frozen has no average
            found, used, picture = validate(averaged, held_out, config.validation_pictures, device)
            log.write(step, **found)
            if step >= config.max_train_steps // 4:
                now = {k: float(numbers[k].detach()) for k in ADVISED if k in numbers}
                for line in advice(used, bits=bits, order=config.model.bit_order, **now):
                    print(f"warning: {line}", flush=True)
            dashboard = out / f"codes-{step}.png"
            draw_dashboard(used, dashboard, bits=bits, order=config.model.bit_order, title=f"step {step}: ")
            facts = {"step": step, "psnr": found["psnr"], "mmdlm_version": __version__}
            write_whole(out / f"held_out-{step}.png", png(picture, facts))
            with whole_directory(out / "visual_tokenizer") as place:
                averaged.save_pretrained(place)
            plot_curves(out)
        if saves:
            came = accelerator.reduce(came, "sum") * accelerator.is_main_process
        if accelerator.is_main_process and saves:
            parts = {"model": model.state_dict(), "average": average.state}
            state = {"optimizer": optimizer.state_dict(), "score_means": score_means, "came": came}
            if discriminator and judge_optimizer:
                parts["discriminator"] = accelerator.unwrap_model(discriminator).state_dict()
                state["judge_optimizer"] = judge_optimizer.state_dict()
            save_checkpoint(out, step, weights=parts, state=state, meta={}, keep=config.checkpoints_total_limit)
        accelerator.wait_for_everyone()
        if stopped and not last:
            accelerator.print(f"stopped as asked after step {step}: the same command goes on from checkpoint-{step}")
            return


if __name__ == "__main__":
    run_program(main)
