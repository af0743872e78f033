"""Trains the mask predictor: rows, corruption, loss, step; read it top to bottom.

    mmdlm run train/supervised --config pictures data=PICTURES tokenizer=RUN/visual_tokenizer out=RUN
    accelerate launch --config_file train/accelerate/fsdp2.yaml "$(mmdlm path train/supervised)" --config pictures ...

One batch mixes tasks and sources (`mmdlm.training.rows`). Pictures are masked by the cosine schedule with weight 1
(MaskGIT, arXiv 2202.04200), text linearly with weight 1/t (LLaDA, arXiv 2502.09992). The head runs over supervised
places and their modality's columns only, in chunks: no [B, L, V] tensor ever exists. A step's rows, noise and
normalisers are those of its whole batch, however many processes and accumulated parts share it. `data` is a picture
world, a folder of pictures with words (what `open_pairs` takes), or a weighted list of both.

A run directory holds checkpoints (the newest and the best), metrics.jsonl, report.html, curves.png, sheets of drawings,
and the model directory `pipeline/` (full=true), or `adapter/` (full=false), which `--adapter` reads.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from mmdlm.assets import shipped_model
from mmdlm.config import save_config
from mmdlm.data.coded_sources import folder_hash, open_sources
from mmdlm.errors import InputError
from mmdlm.model_directory import check_model_directory, model_hash, read_presets
from mmdlm.models.adapters import add_lora, save_adapter
from mmdlm.models.mask_predictor import MaskPredictor, MaskPredictorConfig
from mmdlm.models.new_words import add_new_words, processor_with, settle_new_words
from mmdlm.models.packed_attention import attend_by_document
from mmdlm.models.visual_tokenizer import LFQTokenizer, saved_tokenizer
from mmdlm.pipelines import DEFAULT_PRESETS, TextToImage
from mmdlm.pipelines.run_samples import save_samples, set_lengths
from mmdlm.processing import MMDLMProcessor
from mmdlm.training import checkpoints, traps
from mmdlm.training.arguments import config_from_arguments, run_program
from mmdlm.training.held_out import validate
from mmdlm.training.interrupts import StopRequest
from mmdlm.training.known_words import every_text, some_words, write_words
from mmdlm.training.masked_loss import (
    MaskedLoss,
    NoiseSettings,
    corrupt,
    lesson_for,
    measured,
    normalisers,
    pack,
    per_written_token,
)
from mmdlm.training.optimizing import OptimizerSettings, build_optimizers, learning_share
from mmdlm.training.processes import gathered, largest, load_optimizers, peak_memory, spread_like, summed
from mmdlm.training.report import write_report
from mmdlm.training.rows import Pool, Rows, RowSettings, widened
from mmdlm.training.run_log import RunLog, plot_curves


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
class Source:
    """One of several sources of rows."""

    path: str
    weight: float = 1.0
    keep: bool = False  # its targets are what the model said before the run, not its own: see `Lesson`


@dataclass
class Config(RowSettings, NoiseSettings, OptimizerSettings):
    """Everything a run depends on; a YAML states what differs from these defaults and those of the three above."""

    data: str | list[Source] = ""
    tokenizer: str = ""  # default: that of init_from
    out: str = "runs/predictor"
    init_from: str | None = None  # a model directory, whose weights and words a run starts from
    resolution: int | None = None  # side of a picture in pixels; default the tokenizer's
    held_out_share: float = 0.1  # of paired data
    concepts: int | None = None
    styles: list[str] = field(default_factory=lambda: ["noto", "twemoji", "fluent_flat", "fluent_modern"])
    kind_weights: dict[str, float] | None = None
    scenes: int = 50_000
    singles_first_steps: int = 0
    text_vocab_size: int = 2048
    trunk: Trunk = field(default_factory=Trunk)
    image_fold: int = 1
    max_positions: int = 1024
    full: bool = True  # False: an adapter (LoRA) on frozen weights, of the shipped model where init_from is empty
    rank: int = 16
    lora_alpha: float | None = None  # default: rank
    lora_targets: list[str] | None = None
    closeness: float = 16.0  # of the hidden states of rows that are kept to what they were: see `Lesson`
    new_words: list[str] = field(default_factory=list)  # that get an id of their own, beside those of init_from
    gradient_checkpointing: bool = False
    gradient_accumulation_steps: int = 1
    pack: bool = False  # short rows share one of max_positions places, or of pack_length
    pack_length: int | None = None
    train_batch_size: int = 32  # rows of one process and one accumulated part
    max_train_steps: int = 100_000
    num_train_epochs: float | None = None  # instead of max_train_steps: passes over the first source
    text_weight: float = 0.3
    text_per_word: bool = False  # a row's text counts by its words, not by the places of its answer area
    mixed_precision: str | bool = "no"  # YAML reads a bare no as false
    ema_decay: float = 0.999
    checkpointing_steps: int = 500
    checkpoints_total_limit: int = 2
    logging_steps: int = 50
    validation_steps: int = 1000
    validation_scenes: int = 512
    validation_prompts: list[str] = field(default_factory=list)
    resume_from_checkpoint: str | None = "latest"
    report_to: str = "tensorboard"  # any tracker that accelerate knows, or none


def main(arguments: list[str]) -> None:
    config = config_from_arguments(Config, arguments, program=__file__)
    if not config.full and not config.init_from:
        config.init_from = str(shipped_model())
    if config.init_from:
        check_model_directory(Path(config.init_from))
        config.tokenizer = config.tokenizer or str(Path(config.init_from) / "visual_tokenizer")
    for name in ("data", "tokenizer"):
        if not getattr(config, name):
            raise InputError(f"{name} is empty: give {name}=DIR, or init_from=MODEL, which has a tokenizer.")
    torch.manual_seed(config.seed)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision or "no",
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=config.out,
    )
    if accelerator.state.deepspeed_plugin is not None:  # it asks for what a prepared data loader would tell it
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = config.train_batch_size
    with checkpoints.disk_guard(Path(config.out)), StopRequest() as stop:
        train(config, accelerator, stop)
    accelerator.end_training()


def build_model(config: Config, processor: MMDLMProcessor, tokenizer: LFQTokenizer, longest: int) -> MaskPredictor:
    """The model that is trained: fresh or init_from's, with an adapter where full is false."""
    if config.init_from:
        saved = MaskPredictor.from_pretrained(Path(config.init_from) / "model", dtype=torch.float32)
        # Copied: tensors of a mapped file may lie at odd addresses, where sums differ in their last bit.
        model = MaskPredictor(saved.config)
        model.load_state_dict(saved.state_dict())
        if config.new_words:
            add_new_words(model, config.new_words)
            if config.full:
                settle_new_words(model)
    else:
        model = MaskPredictor(
            MaskPredictorConfig(
                trunk=asdict(config.trunk) | {"max_position_embeddings": config.max_positions},
                vocabulary=processor.vocabulary.to_dict(),
                code_bits=tokenizer.config["codebook_bits"] if tokenizer.config["quantizer"] == "lfq" else 0,
                bit_order=tokenizer.config["bit_order"],
                image_side=processor.image_size // tokenizer.downsample,
                image_fold=config.image_fold,
                max_positions=config.max_positions,
            )
        )
    allowed = max(model.config.max_positions, config.max_positions if config.full else 0)
    if longest > allowed:
        raise InputError(f"the longest row has {longest} tokens, expected at most max_positions {allowed}: shorten it")
    model.config.max_positions = max(model.config.max_positions, longest)
    if not config.full:
        torch.manual_seed(config.seed)
        add_lora(model, rank=config.rank, alpha=config.lora_alpha, targets=config.lora_targets)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def show(pipeline: TextToImage, config: Config, rows: Rows, held_out: list[Rows], step: int) -> None:
    """Writes the model as it stands, pipeline or adapter, and samples of what it does."""
    out, kind = Path(config.out), "pipeline" if config.full else "adapter"
    if config.init_from:
        pipeline.presets = read_presets(Path(config.init_from), DEFAULT_PRESETS)
    else:
        set_lengths(pipeline, config.caption_length, config.answer_length, guided=config.prompt_dropout > 0)
    if config.full:
        pipeline.save_pretrained(out / kind)
    else:
        save_adapter(pipeline.model, out / kind, base=model_hash(Path(config.init_from or "")))
    write_words(out / kind, some_words(rows.pools, seed=config.seed))
    if config.validation_prompts:
        save_samples(pipeline, out, step, config.validation_prompts, held_out[0].pools[0].rows if held_out else None)


def train(config: Config, accelerator: Accelerator, stop: StopRequest) -> None:
    device, rank, processes = accelerator.device, accelerator.process_index, accelerator.num_processes
    out, main_process = Path(config.out), accelerator.is_main_process

    # 1. Pictures as codes, words as ids.
    tokenizer = saved_tokenizer(config.tokenizer).to(device).eval()
    known = None
    if config.init_from:  # the words' ids must stay those that the weights were trained on
        known = MMDLMProcessor.from_pretrained(Path(config.init_from) / "processor")
        if config.new_words:
            known = processor_with(known, config.new_words)
    resolution = config.resolution or (known.image_size if known else tokenizer.config["sample_size"])
    if known and resolution != known.image_size:
        raise InputError(f"resolution is {resolution}, but {config.init_from} was trained with {known.image_size}")
    sources = [Source(config.data)] if isinstance(config.data, str) else config.data
    with accelerator.main_process_first():
        coded = open_sources(
            [(source.path, source.weight) for source in sources],
            lambda pixels: tokenizer.encode(pixels.to(device)),
            resolution=resolution,
            cache=out / "codes",
            tokenizer=folder_hash(Path(config.tokenizer)),
            fit=known.picture_fit if known else "pad",
            scenes=(config.scenes, config.validation_scenes),
            world={"concepts": config.concepts, "styles": config.styles, "kind_weights": config.kind_weights},
            held_out_share=config.held_out_share,
            seed=config.seed,
        )
    train_pools, held_pools = ([Pool(*source) for source in half] for half in coded)
    codes = tokenizer.codebook_size
    processor = known or MMDLMProcessor.of_words(every_text(train_pools), config.text_vocab_size, codes, resolution)
    words = {"text_ids": processor.text_ids, "vocabulary": processor.vocabulary}
    rows = Rows(train_pools, config, **words)
    held_out = [Rows([pool], config, **words) for pool in held_pools]
    longest = max(each.longest() for each in [rows, *held_out])
    rows_a_step, steps = config.train_batch_size * config.gradient_accumulation_steps, config.max_train_steps
    if config.num_train_epochs:
        share = train_pools[0].weight / sum(pool.weight for pool in train_pools)
        steps = math.ceil(config.num_train_epochs * len(train_pools[0].rows) / (share * rows_a_step * processes))

    # 2. Model, optimizers, moving average; a checkpoint where there is one.
    model = build_model(config, processor, tokenizer, longest).to(device)
    pack_length = config.pack_length or model.config.max_positions
    if config.pack and model.config.image_fold == 1:
        attend_by_document(model)
    # A packed row may be longer than any the model knows, for positions start again in it: the check has to allow it.
    model.config.max_positions = max(model.config.max_positions, pack_length)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    taught = {"copied": config.full, "new_words": config.new_words, "closeness": config.closeness}
    lesson = lesson_for([source.keep for source in sources], model, **taught)
    peaks = build_optimizers(model, config)
    restored = checkpoints.load_checkpoint(out, config.resume_from_checkpoint)
    if restored:
        checkpoints.check_same_weights(restored[0], {"model": checkpoints.trained_state(model)}, out)
        model.load_state_dict(restored[0]["model"], strict=config.full)
    if main_process and not restored:  # what would spoil the run in silence; before any weight is spread
        presets = read_presets(Path(config.init_from), DEFAULT_PRESETS) if config.init_from else DEFAULT_PRESETS
        known_mask, guidance = processor.tokenizer.mask_token_id, presets["draw"].get("guidance_scale", 1.0)
        for warning in traps.warnings(
            rows, config, model, tokenizer_mask_id=known_mask, guidance_scale=guidance, fresh=not config.init_from
        ):
            print(f"warning: {warning}", flush=True)
    wrapped, *optimizers = accelerator.prepare(MaskedLoss(model, lesson), *(optimizer for optimizer, _ in peaks))
    average = checkpoints.WeightAverage(model, config.ema_decay)
    step, best = 0, checkpoints.read_best(out)
    if restored:
        means = restored[0]["average"].items()
        average.state = {name: spread_like(v.to(device), average.state[name]) for name, v in means}
        load_optimizers(optimizers, restored[1]["optimizers"], out)
        step = restored[2]["step"]
    best = best if best and best[0] <= step else None  # not of a later step than the one that is gone on from

    log = RunLog(out, step=step, enabled=main_process, also=lambda numbers, at: accelerator.log(numbers, step=at))
    accelerator.init_trackers("mmdlm")
    if main_process:
        save_config(config, out / "config.yaml")
        print(
            f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {trained / 1e6:.2f}M trained, "
            f"vocabulary {processor.vocabulary.size}, {sum(len(pool.rows) for pool in train_pools)} scenes, "
            f"{processes} process(es) on {device}",
            flush=True,
        )

    # 3. The loop.
    def save() -> None:
        parts = gathered({"model": checkpoints.trained_state(model), "average": average.state})
        own = optimizers if accelerator.state.deepspeed_plugin is None else []  # DeepSpeed keeps its moments to itself
        state = gathered({"optimizers": [optimizer.state_dict() for optimizer in own]})
        if main_process:
            keep = {"keep": config.checkpoints_total_limit, "best": best[0] if best else None}
            checkpoints.save_checkpoint(out, step, weights=parts, state=state, meta={}, **keep)

    wrapped.train()
    names, tokens, clock = [pool.name for pool in train_pools], 0, time.monotonic()
    sums, table = torch.zeros(5).double(), torch.zeros(1).double()  # sums: text, image, loss, gradient norm, steps
    bar = tqdm(total=steps, initial=step, unit="step", disable=None if main_process else True)
    while step < steps:
        share = learning_share(config, step, steps)
        for optimizer, (_, peak) in zip(optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * share
        batch = rows.batch(step, rows_a_step, part=(rank, processes), singles=step < config.singles_first_steps)
        width, stopped = largest(accelerator, [batch.valid.shape[1], stop.asked])
        if stopped:
            break
        # Noise, and what dropout draws, are functions of the step: nothing but the step has to be stored to resume.
        noise = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        torch.manual_seed(config.seed * 1_000_003 + step * processes + rank)
        noised = corrupt(
            *widened(batch, int(width), pad_id=processor.vocabulary.pad_id),
            mask_id=processor.vocabulary.mask_id,
            settings=config,
            generator=noise,
            share=(rank, processes),
        )
        noised = per_written_token(noised, processor.vocabulary.eos_id) if config.text_per_word else noised
        counts = summed(accelerator, normalisers(noised)).clamp_min(1).float().to(device)
        losses = torch.zeros(3, device=device)
        for part in noised.parts(config.gradient_accumulation_steps):
            if config.pack:
                part = pack(part, pack_length, image_fold=model.config.image_fold)
            with accelerator.accumulate(wrapped):
                found = wrapped(part.to(device), len(names))
                # Wrappers take the mean over processes, accelerate that over accumulated parts: sums are wanted.
                text, image = found["text"] / counts[0] * processes, found["image"] / counts[1] * processes
                loss = image + config.text_weight * text
                accelerator.backward(loss * config.gradient_accumulation_steps)
            losses += torch.stack([text, image, loss]).detach()
            table = table + found["table"].cpu()
        norm = gathered(accelerator.clip_grad_norm_(wrapped.parameters(), config.max_grad_norm))
        step += 1
        now = torch.tensor([*losses.tolist(), float(norm or 0.0), 1.0]).double()
        if not bool(now.isfinite().all()):
            raise SystemExit(
                f"the loss became {now[2]:g} and its gradient {now[3]:g} at step {step}: lower learning_rate or "
                f"max_grad_norm; the last checkpoint in {out} is whole"
            )
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        average.update(model, step - 1)
        sums, tokens = sums + now, tokens + int(batch.valid.sum())
        bar.update()

        if step % config.logging_steps == 0:
            spent, count = time.monotonic() - clock, float(sums[4])
            means = summed(accelerator, sums) / processes / count
            log.write(
                step,
                measured(summed(accelerator, table), names),
                loss=float(means[2]),
                image=float(means[1]),
                text=float(means[0]),
                gradient_norm=float(means[3]),
                learning_share=share,
                rows_per_second=count * rows_a_step * processes / spent,
                tokens_per_second=float(summed(accelerator, torch.tensor(float(tokens)))) / spent,
                peak_memory_gb=largest(accelerator, [peak_memory(device)])[0],
            )
            sums, table, tokens, clock = torch.zeros_like(sums), torch.zeros(1).double(), 0, time.monotonic()
        saving = step % config.checkpointing_steps == 0 or step == steps
        if step % config.validation_steps == 0 or step == steps:
            held_out_loss, averages = -math.inf, gathered(average.state)
            if main_process:
                averaged = build_model(config, processor, tokenizer, longest).to(device)
                averaged.load_state_dict(averages, strict=config.full)
                means, details = validate(
                    averaged, held_out, config, rows=config.validation_scenes, batch_size=config.train_batch_size
                )
                log.write(step, details, **means)
                held_out_loss = means.get("held_out_image", 0.0) + config.text_weight * means.get("held_out_text", 0.0)
                pipeline = TextToImage(model=averaged.eval(), visual_tokenizer=tokenizer, processor=processor)
                show(pipeline, config, rows, held_out, step)
                plot_curves(out)
                facts = {"data": ", ".join(names), "rows": sum(len(pool.rows) for pool in train_pools), "step": step}
                facts |= {"parameters trained": f"{trained / 1e6:.2f}M", "processes": processes}
                write_report(out, title=out.name, facts=facts | {"drawn": " · ".join(config.validation_prompts)})
            [held_out_loss] = largest(accelerator, [held_out_loss])
            if held_out and (best is None or held_out_loss < best[1]):
                best, saving = (step, held_out_loss), True
        if saving:  # after the look at it: a run whose last checkpoint is whole has everything else too
            save()
            if main_process and best and best[0] == step:
                checkpoints.write_best(out, *best)
        accelerator.wait_for_everyone()
    bar.close()
    if step < steps:
        save()
    if main_process:
        said = {"out": str(out / ("pipeline" if config.full else "adapter")), "steps": step}
        print(json.dumps(said | ({"stopped": "SIGTERM"} if step < steps else {})), flush=True)


if __name__ == "__main__":
    run_program(main)
