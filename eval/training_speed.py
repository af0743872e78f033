"""What a training step costs, ours against the plain one, with the same loss and gradient, in one run, alternating.

    mmdlm run eval/training_speed                       # both vocabularies
    mmdlm run eval/training_speed vocabularies=[small] pairs=7

plain: padded batches, a dense attention mask, logits [B, L, V] of every place, cross entropy of all of them.
ours: rows packed into one (`mmdlm.training.masked_loss.pack`), attention document by document
    (`mmdlm.models.packed_attention`), the head on supervised places only, in chunks, its gradient made in the same pass
    (`mmdlm.objectives.linear_cross_entropy`).

The trunk has an 8B's proportions (a Llama whose MLP is three times its width, V / D as in MMaDA's 134,656 / 4,096) at
width 512 with 8 layers: `small` has 3,952 text ids and 256 codes, `full` has MMaDA's whole vocabulary, 126,464 and
8,192. Both steps take the softmax over the whole vocabulary. Rows: pictures of 256 codes drawn and described, and
texts, 7 : 6 : 2, of lengths drawn once from the seed. Forward and backward, no optimizer, float32.

Peak memory is that of a process of its own for each side. Prints a Markdown table; run.json goes to `out`.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdlm.errors import InputError
from mmdlm.evaluation.runs import write_run
from mmdlm.models.mask_predictor import MaskPredictor, MaskPredictorConfig
from mmdlm.models.packed_attention import attend_by_document
from mmdlm.objectives import linear_cross_entropy, supervised_places
from mmdlm.sequence import Canvas, batch, image, interleave, text
from mmdlm.training.arguments import config_from_arguments, run_program
from mmdlm.training.masked_loss import NoisedRows, NoiseSettings, corrupt, pack
from mmdlm.training.processes import peak_memory
from mmdlm.vocabulary import Vocabulary

VOCABULARIES = {"small": (3952, 256), "full": (126_464, 8192)}  # text ids, image codes
SIDES = ("plain", "ours")
SPECIAL = ("pad", "mask", "bos", "eos", "boi", "eoi", "draw", "describe", "ask")


@dataclass
class Config:
    """What to measure."""

    vocabularies: list[str] = field(default_factory=lambda: list(VOCABULARIES))
    rows: dict[str, int] = field(default_factory=lambda: {"small": 15, "full": 15})
    width: int = 512
    layers: int = 8
    side: int = 16  # of a picture, in codes
    prompt: tuple[int, int] = (8, 64)  # fewest and most tokens of a prompt
    answer: tuple[int, int] = (16, 128)  # of a caption or answer
    words: tuple[int, int] = (64, 256)  # of a text without a picture
    pairs: int = 5
    memory: bool = True  # measured in two further processes
    threads: int | None = None  # None: torch's own choice
    seed: int = 0
    out: str = "runs/training_speed"
    only: str | None = None  # of a child: which side


def main(arguments: list[str]) -> None:
    config = config_from_arguments(Config, arguments, program=__file__)
    unknown = set(config.vocabularies) - set(VOCABULARIES)
    if unknown or config.pairs < 1:
        raise InputError(
            f"vocabularies is {config.vocabularies} and pairs {config.pairs}, expected some of "
            f"{', '.join(VOCABULARIES)} and at least 1."
        )
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.only:
        return one_step(config)
    started, found = time.monotonic(), {}
    for name in config.vocabularies:
        print(f"measuring: {name}", file=sys.stderr, flush=True)
        found[name] = compared(config, name, arguments)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    command = ["mmdlm", "run", "eval/training_speed", *arguments]
    settings = asdict(config) | {"threads": torch.get_num_threads()}
    write_run(
        out,
        kind="training_speed",
        command=command,
        seed=config.seed,
        settings=settings,
        results=found,
        seconds=time.monotonic() - started,
    )
    print(table(found))
    print(f"\n`{' '.join(command)}`, {torch.get_num_threads()} threads, torch {torch.__version__}, seed {config.seed}")


def compared(config: Config, name: str, arguments: list[str]) -> dict[str, Any]:
    """Seconds of both sides in turn, loss and gradient norm of both, peak memory of a process for each."""
    memory: dict[str, dict[str, float]] = {}
    for side in SIDES if config.memory else ():
        command = [sys.executable, __file__, *arguments, f"only={side}", f"vocabularies=[{name}]"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise InputError(f"the {side} step ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
        memory[side] = json.loads(done.stdout.splitlines()[-1])
    model, noised = parts(config, name)
    packed = packed_rows(config, noised)
    steps: dict[str, Callable[[], tuple[float, float]]] = {
        "plain": lambda: plain(model, noised),
        "ours": lambda: ours(model, packed),
    }
    values = {side: step() for side, step in steps.items()}  # the first call allocates
    for one, other in zip(values["plain"], values["ours"], strict=True):
        if abs(one - other) > 1e-4 * abs(one):
            raise RuntimeError(f"the two steps differ: {values}")
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(config.pairs):
        for side in SIDES:
            begun = time.perf_counter()
            steps[side]()
            seconds[side].append(time.perf_counter() - begun)
    return {
        "rows": len(noised.ids),
        "places": {"plain": noised.ids.numel(), "ours": packed.ids.numel(), "asked": int(noised.supervised.sum())},
        "loss": {side: value[0] for side, value in values.items()},
        "gradient_norm": {side: value[1] for side, value in values.items()},
        "seconds": seconds,
        "faster": [a / b for a, b in zip(seconds["plain"], seconds["ours"], strict=True)],
        "peak_gb": {side: found["peak_gb"] for side, found in memory.items()},
        "cpu_seconds": {side: found["cpu_seconds"] for side, found in memory.items()},  # of the first step
        "step_gb": {side: found["peak_gb"] - found["before_gb"] for side, found in memory.items()},
    }


def one_step(config: Config) -> None:
    """In a process of its own: a step of one side, and the most memory it ever held, in GB, with and before it."""
    [name] = config.vocabularies
    model, noised = parts(config, name)
    packed = packed_rows(config, noised)
    before = peak_memory(torch.device("cpu"))
    begun = time.process_time()
    plain(model, noised) if config.only == "plain" else ours(model, packed)
    spent = time.process_time() - begun
    print(json.dumps({"peak_gb": peak_memory(torch.device("cpu")), "before_gb": before, "cpu_seconds": spent}))


def parts(config: Config, name: str) -> tuple[MaskPredictor, NoisedRows]:
    """The model, and rows with their masks, the same for both sides."""
    text_size, codes = VOCABULARIES[name]
    special = {f"{word}_id": number for number, word in enumerate(SPECIAL)}
    vocabulary = Vocabulary(text_size=text_size, image_start=text_size, image_size=codes, **special)
    trunk = {"model_type": "llama", "hidden_size": config.width, "intermediate_size": 3 * config.width}
    trunk |= {"num_hidden_layers": config.layers, "num_attention_heads": config.width // 64}
    trunk |= {"num_key_value_heads": config.width // 64, "max_position_embeddings": 4096}
    torch.manual_seed(config.seed)
    settings = {"trunk": trunk, "vocabulary": vocabulary.to_dict(), "max_positions": 1 << 16}
    model = MaskPredictor(MaskPredictorConfig(**settings))
    canvas, valid = batch(canvases(config, vocabulary, config.rows[name]), pad_id=vocabulary.pad_id)
    noise = torch.Generator().manual_seed(config.seed)
    noised = corrupt(
        canvas, valid, [0] * len(valid), mask_id=vocabulary.mask_id, settings=NoiseSettings(), generator=noise
    )
    return model, noised


def canvases(config: Config, vocabulary: Vocabulary, count: int) -> list[Canvas]:
    """Drawing, describing and texts, 7 : 6 : 2."""
    chance = random.Random(config.seed)

    def words(length: tuple[int, int], editable: bool = False) -> Any:
        ids = [chance.randrange(len(SPECIAL), vocabulary.text_size) for _ in range(chance.randint(*length))]
        return text(ids, editable=editable)

    def picture(editable: bool = False) -> Any:
        ids = [chance.randrange(vocabulary.image_size) for _ in range(config.side**2)]
        return image(torch.tensor(ids), config.side, config.side, vocabulary, editable=editable)

    made = []
    for n in range(count):
        kind = "draw" if n == 14 else ["draw", "describe", "draw", "describe", "draw", "describe", "text"][n % 7]
        if kind == "draw":
            made.append(interleave([text([vocabulary.draw_id]), words(config.prompt), picture(True)]))
        elif kind == "describe":
            made.append(interleave([text([vocabulary.describe_id]), picture(), words(config.answer, True)]))
        else:
            made.append(interleave([text([vocabulary.bos_id]), words(config.prompt), words(config.words, True)]))
    return made


def packed_rows(config: Config, noised: NoisedRows) -> NoisedRows:
    return pack(noised, noised.ids.numel())


def plain(model: MaskPredictor, noised: NoisedRows) -> tuple[float, float]:
    """(loss, norm of the gradient) from logits of every place."""
    model.zero_grad()
    model.trunk.set_attn_implementation("sdpa")
    seen = (noised.documents >= 0)[:, None, None].expand(-1, 1, noised.ids.shape[1], -1).contiguous()
    logits = model(noised.ids, attention_mask=seen, position_ids=noised.positions).logits
    losses = F.cross_entropy(logits.flatten(0, 1), noised.targets.flatten(), reduction="none")
    loss = (losses * noised.weight.flatten()).sum() / noised.supervised.sum()
    loss.backward()
    return float(loss.detach()), gradient_norm(model)


def ours(model: MaskPredictor, noised: NoisedRows) -> tuple[float, float]:
    """The same from the supervised places of packed rows."""
    model.zero_grad()
    attend_by_document(model)
    where = supervised_places(noised.supervised)
    asked = noised.supervised.gather(1, where)
    seen = noised.documents[:, None, None]
    hidden = model(noised.ids, attention_mask=seen, position_ids=noised.positions, where=where, columns=(0, 0)).hidden
    targets, weights = noised.targets.gather(1, where)[asked], noised.weight.gather(1, where)[asked]
    loss = linear_cross_entropy(hidden[asked], model.head_rows(), targets, weights) / noised.supervised.sum()
    loss.backward()
    return float(loss.detach()), gradient_norm(model)


def gradient_norm(model: MaskPredictor) -> float:
    gradients: list[Tensor] = [p.grad for p in model.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def table(found: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| vocabulary | rows, places plain / packed / asked | time, plain / ours | peak memory, ours / plain "
        "| of the step alone |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, one in found.items():
        ratios, places, peak, step = one["faster"], one["places"], one["peak_gb"], one["step_gb"]
        lines.append(
            f"| {name}, {sum(VOCABULARIES[name])} ids | {one['rows']}, {places['plain']} / {places['ours']} / "
            f"{places['asked']} | {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}; "
            f"{median(one['seconds']['plain']):.2f} s against {median(one['seconds']['ours']):.2f} s) | "
            + " | ".join(
                f"{m['ours'] / m['plain']:.2f} ({m['ours']:.2f} of {m['plain']:.2f} GB)" if m else "-"
                for m in (peak, step)
            )
            + " |"
        )
        lines.append(
            f"| | loss {one['loss']['plain']:.6f}, {one['loss']['ours']:.6f} | gradient norm "
            f"{one['gradient_norm']['plain']:.6f}, {one['gradient_norm']['ours']:.6f} | | |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_program(main)
