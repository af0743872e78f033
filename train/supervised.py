"""Trains the mask predictor: rows, corruption, loss, step; read it top to bottom.

    mmdlm run train/supervised --config pictures data=PICTURES tokenizer=RUN/visual_tokenizer out=RUN
    torchrun --nproc_per_node 2 "$(mmdlm path train/supervised)" --config pictures data=PICTURES ...

One batch mixes tasks: text to picture, picture to caption, picture and question to answer, and pictures without words
(the unconditional branch of guidance). They differ in which places are corruptible and in nothing else. Pictures are
masked by the cosine schedule with weight 1 (MaskGIT, arXiv 2202.04200), text linearly with weight 1/t (LLaDA, arXiv
2502.09992). The head runs over supervised places and their modality's columns only: no [B, L, V] tensor ever exists.

A run directory holds checkpoints (resumable), metrics.jsonl, curves.png, sheets of drawings, and `pipeline/`, the model
directory that every `from_pretrained` and `mmdlm --model` reads.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from mmdlm import attention
from mmdlm.config import save_config
from mmdlm.corruption import mask
from mmdlm.data.coded import CodedScenes, coded_scenes
from mmdlm.data.scenes import PictureWorld
from mmdlm.errors import InputError
from mmdlm.models.mask_predictor import MaskPredictor, MaskPredictorConfig
from mmdlm.models.visual_tokenizer import LFQTokenizer
from mmdlm.objectives import linear_cross_entropy, supervised_places
from mmdlm.pipelines import TextToImage
from mmdlm.processing import MMDLMProcessor
from mmdlm.schedules import by_modality, sample_t, schedule_by_name
from mmdlm.sequence import IMAGE, Canvas, ask_canvas, batch, describe_canvas, draw_canvas
from mmdlm.text_tokenizer import train_text_tokenizer
from mmdlm.training.arguments import config_from_arguments, run_program
from mmdlm.training.checkpoints import WeightAverage, load_checkpoint, save_checkpoint
from mmdlm.training.run_log import RunLog, plot_curves
from mmdlm.vocabulary import Vocabulary


@dataclass
class Trunk:
    """The decoder's shape; any transformers decoder of that name."""

    model_type: str = "llama"
    hidden_size: int = 384
    intermediate_size: int = 1024
    num_hidden_layers: int = 11
    num_attention_heads: int = 6
    num_key_value_heads: int = 6


@dataclass
class Config:
    """Everything a run depends on; a YAML states what differs from these defaults."""

    data: str = ""
    tokenizer: str = ""
    out: str = "runs/predictor"
    init_from: str | None = None  # a model directory, whose weights and words a run starts from
    concepts: int | None = None
    styles: list[str] = field(default_factory=lambda: ["noto", "twemoji", "fluent_flat", "fluent_modern"])
    kind_weights: dict[str, float] | None = None
    scenes: int = 50_000
    singles_first_steps: int = 0
    text_vocab_size: int = 2048
    trunk: Trunk = field(default_factory=Trunk)
    image_fold: int = 1
    max_positions: int = 1024
    draw_share: float = 0.6
    describe_share: float = 0.2
    prompt_dropout: float = 0.1
    canonical_share: float = 0.5
    caption_length: int = 24
    answer_length: int = 12
    image_schedule: str = "maskgit"
    text_schedule: str = "linear"
    text_weight: float = 0.3
    minimum_t: float = 0.02
    seed: int = 0
    train_batch_size: int = 32
    max_train_steps: int = 100_000
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    muon_learning_rate: float = 0.01
    lr_warmup_steps: int = 200
    lr_end: float = 0.02
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    mixed_precision: str = "no"
    ema_decay: float = 0.999
    checkpointing_steps: int = 500
    checkpoints_total_limit: int = 2
    logging_steps: int = 50
    validation_steps: int = 1000
    validation_scenes: int = 512
    validation_prompts: list[str] = field(default_factory=list)
    resume_from_checkpoint: str | None = "latest"


class Rows:
    """Batches of canvases: a pure function of (seed, step, process), so that a resumed run sees the same rows."""

    def __init__(self, scenes: CodedScenes, config: Config, processor: MMDLMProcessor):
        self.scenes, self.config, self.vocabulary = scenes, config, processor.vocabulary
        self.grid = (scenes.codes.shape[1], scenes.codes.shape[2])
        self.text_ids = processor.text_ids
        self.known: dict[str, list[int]] = {}
        self.everything = list(range(len(scenes)))
        # At the door, not in the middle of the night: every target must fit with its eos.
        captions = max(len(self.ids(captions[0])) for captions in scenes.captions)
        answers = max(len(self.ids(answer)) for pairs in scenes.questions for _, answer in pairs)
        if captions >= config.caption_length or answers >= config.answer_length:
            raise InputError(
                f"the longest caption has {captions} tokens and the longest answer {answers}: set caption_length above "
                f"the one (now {config.caption_length}) and answer_length above the other (now {config.answer_length})"
            )
        self.singles = [n for n, kind in enumerate(scenes.kinds) if kind == "single"]

    def batch(self, number: int, size: int, *, singles: bool = False) -> tuple[Canvas, Tensor]:
        """Batch `number`: (canvas [B, L], valid [B, L]); `singles` leaves out scenes of several or changed objects."""
        chance = random.Random(f"{self.config.seed}-{number}")
        pool = self.singles if singles else self.everything
        return batch([self.row(chance, chance.choice(pool)) for _ in range(size)], pad_id=self.vocabulary.pad_id)

    def row(self, chance: random.Random, n: int) -> Canvas:
        """Scene n as a row of one task."""
        c = self.config
        codes = self.scenes.codes[n].long()
        task = chance.random()
        if task < c.draw_share:
            prompt = "" if chance.random() < c.prompt_dropout else self.phrasing(n, chance)
            return draw_canvas(self.ids(prompt), codes, self.grid, self.vocabulary)
        if task < c.draw_share + c.describe_share:
            caption = self.ids(self.scenes.captions[n][0])
            return describe_canvas(codes, self.grid, caption, c.caption_length, self.vocabulary)
        question, answer = chance.choice(self.scenes.questions[n])
        return ask_canvas(codes, self.grid, self.ids(question), self.ids(answer), c.answer_length, self.vocabulary)

    def phrasing(self, n: int, chance: random.Random) -> str:
        captions = self.scenes.captions[n]
        return captions[0] if chance.random() < self.config.canonical_share else chance.choice(captions)

    def ids(self, text: str) -> list[int]:
        if text not in self.known:
            self.known[text] = self.text_ids(text) if text else []
        return self.known[text]


def masked_losses(
    model: torch.nn.Module,
    inner: MaskPredictor,
    canvas: Canvas,
    valid: Tensor,
    config: Config,
    generator: torch.Generator,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Corrupts a batch and asks the model once: {modality: (sum of weighted losses, normaliser)}.

    Images are normalised by the number of masked places, text by the length of the answers (LLaDA, equation 5).
    """
    text = schedule_by_name(config.text_schedule)
    schedule = by_modality(canvas.modality, text=text, image=schedule_by_name(config.image_schedule))
    t = sample_t(len(canvas.ids), generator=generator, minimum=config.minimum_t).to(canvas.ids.device)
    corrupted = mask(
        canvas.ids,
        t,
        corruptible=canvas.editable,
        mask_id=inner.vocabulary.mask_id,
        schedule=schedule,
        generator=generator,
        at_least_one=True,
    )
    where = supervised_places(corrupted.supervised)
    seen = attention.full(valid)
    hidden = model(
        corrupted.x_t, attention_mask=seen, position_ids=canvas.positions, grid=canvas.grid, where=where, columns=(0, 0)
    ).hidden
    asked = corrupted.supervised.gather(1, where)
    targets, weights = canvas.ids.gather(1, where), corrupted.weight.gather(1, where)
    is_image = canvas.modality.gather(1, where) == IMAGE
    losses = {}
    for name, chosen, columns in (
        ("image", asked & is_image, inner.vocabulary.image_columns),
        ("text", asked & ~is_image, inner.vocabulary.text_columns),
    ):
        total = linear_cross_entropy(
            hidden[chosen], inner.head_rows(columns), targets[chosen] - columns[0], weights[chosen]
        )
        places = chosen if name == "image" else canvas.editable & (canvas.modality != IMAGE)
        losses[name] = (total, places.sum().clamp_min(1))
    return losses


def build_processor(scenes: CodedScenes, config: Config, tokenizer: LFQTokenizer) -> MMDLMProcessor:
    """A byte-level BPE learned on the pool's words, and the shared vocabulary: text ids, then image codes."""
    words = [text for captions in scenes.captions for text in captions]
    words += [text for pairs in scenes.questions for pair in pairs for text in pair]
    text = train_text_tokenizer(words, config.text_vocab_size)
    names = {"mask_id": "mask", "bos_id": "bos", "eos_id": "eos", "pad_id": "pad", "boi_id": "boi", "eoi_id": "eoi"}
    names |= {"draw_id": "draw", "describe_id": "describe", "ask_id": "ask"}
    ids = {key: text.convert_tokens_to_ids(f"<|{word}|>") for key, word in names.items()}
    vocabulary = Vocabulary(text_size=len(text), image_start=len(text), image_size=tokenizer.codebook_size, **ids)
    return MMDLMProcessor(text, vocabulary=vocabulary.to_dict(), image_size=tokenizer.config["sample_size"])


def build_model(config: Config, vocabulary: Vocabulary, tokenizer: LFQTokenizer) -> MaskPredictor:
    side = tokenizer.config["sample_size"] // tokenizer.downsample
    bits = tokenizer.config["codebook_bits"] if tokenizer.config["quantizer"] == "lfq" else 0
    return MaskPredictor(
        MaskPredictorConfig(
            trunk=asdict(config.trunk) | {"max_position_embeddings": config.max_positions},
            vocabulary=vocabulary.to_dict(),
            code_bits=bits,
            bit_order=tokenizer.config["bit_order"],
            image_side=side,
            image_fold=config.image_fold,
            max_positions=config.max_positions,
        )
    )


def build_optimizers(model: MaskPredictor, config: Config) -> list[tuple[torch.optim.Optimizer, float]]:
    """(optimizer, peak learning rate): AdamW for everything, or Muon (torch's own) for the trunk's matrices first."""
    matrices = [p for n, p in model.trunk.named_parameters() if p.ndim == 2 and "embed" not in n]
    if config.optimizer == "adamw":
        matrices = []
    elif config.optimizer != "muon":
        raise InputError(f"optimizer is {config.optimizer!r}, expected 'adamw' or 'muon'")
    elif not hasattr(torch.optim, "Muon"):
        raise InputError(
            f"optimizer is 'muon', which torch {torch.__version__} lacks: use torch 2.9 or later, or adamw"
        )
    chosen = {id(p) for p in matrices}
    decayed = [p for p in model.parameters() if id(p) not in chosen and p.ndim == 2]
    rest = [p for p in model.parameters() if id(p) not in chosen and p.ndim != 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)
    optimizers: list[tuple[torch.optim.Optimizer, float]] = [(adamw, config.learning_rate)]
    if matrices:
        muon = torch.optim.Muon(matrices, lr=config.muon_learning_rate, weight_decay=config.weight_decay)
        optimizers.append((muon, config.muon_learning_rate))
    return optimizers


def learning_share(config: Config, step: int) -> float:
    """Share of the peak learning rate: linear warm-up, then cosine down to `lr_end`."""
    if step < config.lr_warmup_steps:
        return (step + 1) / config.lr_warmup_steps
    share = (step - config.lr_warmup_steps) / max(config.max_train_steps - config.lr_warmup_steps, 1)
    return config.lr_end + (1 - config.lr_end) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


@torch.no_grad()
def validate(model: MaskPredictor, rows: Rows, config: Config) -> dict[str, float]:
    """Mean losses over fixed held-out rows, with fixed noise: comparable between steps."""
    model.eval()
    generator = torch.Generator().manual_seed(0)
    sums: dict[str, list[float]] = {"image": [0.0, 0.0], "text": [0.0, 0.0]}
    for number in range(max(config.validation_scenes // config.train_batch_size, 1)):
        canvas, valid = rows.batch(number, config.train_batch_size)
        canvas = Canvas(*(part.to(model.device) for part in canvas))
        for name, (total, normaliser) in masked_losses(
            model, model, canvas, valid.to(model.device), config, generator
        ).items():
            sums[name][0] += float(total)
            sums[name][1] += float(normaliser)
    return {f"held_out_{name}": total / max(count, 1) for name, (total, count) in sums.items()}


def draw_sheet(pipeline: TextToImage, prompts: list[str]) -> Image.Image:
    """One drawing of every prompt, eight a row, seed 0."""
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(0) for _ in prompts]
    images = pipeline(prompts, generator=generators).images
    side = images[0].width * 2
    canvas = Image.new("RGB", (side * min(len(images), 8), side * -(-len(images) // 8)), "white")
    for index, image in enumerate(images):
        canvas.paste(image.resize((side, side), Image.Resampling.NEAREST), (index % 8 * side, index // 8 * side))
    return canvas


def folder_hash(folder: Path) -> str:
    """Of the weights and settings of a saved tokenizer: keys the pool of codes."""
    return hashlib.sha256(b"".join(p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file())).hexdigest()[:16]


def main(arguments: list[str]) -> None:
    config = config_from_arguments(Config, arguments, program=__file__)
    torch.manual_seed(config.seed)
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    device, rank, processes = accelerator.device, accelerator.process_index, accelerator.num_processes
    out = Path(config.out)

    # 1. Pictures as codes, words as ids.
    tokenizer = LFQTokenizer.from_pretrained(config.tokenizer).to(device).eval()
    size = tokenizer.config["sample_size"]
    settings = {
        "concepts": config.concepts,
        "styles": config.styles,
        "resolution": size,
        "kind_weights": config.kind_weights,
    }
    pools = {}
    with accelerator.main_process_first():
        for split, count in (("train", config.scenes), ("held_out", config.validation_scenes)):
            world = PictureWorld(config.data, split=split, **settings)
            key = settings | {"split": split, "tokenizer": folder_hash(Path(config.tokenizer))}
            pools[split] = coded_scenes(
                world, range(count), lambda pixels: tokenizer.encode(pixels.to(device)), cache=out / "codes", key=key
            )
    if config.init_from:
        # The words' ids must stay those that the weights were trained on.
        processor = MMDLMProcessor.from_pretrained(Path(config.init_from) / "processor")
    else:
        processor = build_processor(pools["train"], config, tokenizer)
    rows, held_out = Rows(pools["train"], config, processor), Rows(pools["held_out"], config, processor)

    # 2. Model, optimizers, moving average; a checkpoint where there is one.
    model = build_model(config, processor.vocabulary, tokenizer).to(device)
    if config.init_from:
        model.load_state_dict(MaskPredictor.from_pretrained(Path(config.init_from) / "model").state_dict())
    average = WeightAverage(model, config.ema_decay)
    optimizers = build_optimizers(model, config)
    step = 0
    restored = load_checkpoint(out, config.resume_from_checkpoint) if config.resume_from_checkpoint else None
    if restored:
        weights, state, meta = restored
        model.load_state_dict(weights["model"])
        average.state = {name: value.to(device) for name, value in weights["average"].items()}
        for (optimizer, _), saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step = meta["step"]
    wrapped = accelerator.prepare(model)
    log = RunLog(out, step=step, enabled=accelerator.is_main_process)
    if accelerator.is_main_process:
        save_config(config, out / "config.yaml")
        print(
            f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, "
            f"vocabulary {processor.vocabulary.size}, {len(pools['train'])} scenes, "
            f"{processes} process(es) on {device}",
            flush=True,
        )

    # 3. The loop.
    wrapped.train()
    clock, seen, tokens = time.monotonic(), 0, 0
    running: dict[str, float] = {}
    while step < config.max_train_steps:
        share = learning_share(config, step)
        for optimizer, peak in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * share
        canvas, valid = rows.batch(
            step * processes + rank, config.train_batch_size, singles=step < config.singles_first_steps
        )
        canvas, valid = Canvas(*(part.to(device) for part in canvas)), valid.to(device)
        # Noise is a function of the step too: nothing but the step has to be stored to resume.
        noise = torch.Generator().manual_seed(config.seed * 1_000_003 + step * processes + rank)
        with accelerator.autocast():
            losses = masked_losses(wrapped, model, canvas, valid, config, noise)
        means = {name: total / count for name, (total, count) in losses.items()}
        loss = means["image"] + config.text_weight * means["text"]
        for optimizer, _ in optimizers:
            optimizer.zero_grad(set_to_none=True)
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(wrapped.parameters(), config.max_grad_norm)
        for optimizer, _ in optimizers:
            optimizer.step()
        average.update(model, step)
        step += 1
        seen += config.train_batch_size * processes
        tokens += int(valid.sum()) * processes

        if not math.isfinite(float(loss.detach())):
            raise SystemExit(
                f"the loss became {float(loss.detach())} at step {step}: lower learning_rate or max_grad_norm; "
                f"the last checkpoint in {out} is whole"
            )
        for name, value in {"loss": loss, **means, "gradient_norm": norm}.items():
            running[name] = running.get(name, 0.0) + float(value.detach())
        if step % config.logging_steps == 0:
            spent = time.monotonic() - clock
            steps = seen / (config.train_batch_size * processes)
            log.write(
                step,
                **{name: total / steps for name, total in running.items()},
                learning_share=share,
                rows_per_second=seen / spent,
                tokens_per_second=tokens / spent,
            )
            running, clock, seen, tokens = {}, time.monotonic(), 0, 0
        last = step == config.max_train_steps
        if accelerator.is_main_process and (step % config.checkpointing_steps == 0 or last):
            parts = {"model": model.state_dict(), "average": average.state}
            state = {"optimizers": [optimizer.state_dict() for optimizer, _ in optimizers]}
            save_checkpoint(out, step, weights=parts, state=state, meta={}, keep=config.checkpoints_total_limit)
        if accelerator.is_main_process and (step % config.validation_steps == 0 or last):
            averaged = build_model(config, processor.vocabulary, tokenizer).to(device)
            averaged.load_state_dict(average.state)
            log.write(step, **validate(averaged, held_out, config))
            pipeline = TextToImage(model=averaged.eval(), visual_tokenizer=tokenizer, processor=processor)
            pipeline.save_pretrained(out / "pipeline")
            if config.validation_prompts:
                draw_sheet(pipeline, config.validation_prompts).save(out / f"drawings-{step}.png")
            plot_curves(out)
        accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        print(json.dumps({"out": str(out / "pipeline"), "steps": step}), flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    run_program(main)
