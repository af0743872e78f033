"""The judge: what is in a picture of the picture world, seen by a small classifier that never saw a generated picture.

    judge = cached_judge(world, JudgeSettings(), Path("cache"))      # trained on renders of the whole world
    judge(pictures)[0].facts        # {kind, background, relation, objects: [{concept, colour, count, ...}]}

A scene puts its objects on a few fixed places ("slots"). The judge looks at each of the 13 slots with some of its
surroundings and asks one small network three things: does an object stand exactly here, which concept is it, was it
recoloured. The layout is the one of the world's that agrees best with all 13 answers; the background is the named
colour that most of the picture's border has.

The judge is trained on all compositions, those too that are held out of the models it judges: one that had never seen
a purple car would be biased against models that draw one (in a trial it took 18 % of such renders for cars in their
own colour). What it is measured on is a part of the scenes kept back from it (`is_kept_back`).
Shape letters: N pictures, M crops, S slots, C concepts.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from mmdlm.data.colours import BACKGROUNDS, PAINTS
from mmdlm.data.concepts import Concept
from mmdlm.data.scenes import (
    _CORNERS,
    _COUNT_PLACES,
    _LARGE,
    _PAIR,
    _PAIR_PLACES,
    _PAIR_POSITIONS,
    _SMALL,
    PictureWorld,
    Scene,
)
from mmdlm.errors import InputError
from mmdlm.evaluation.softening import soften

SIDE = 64  # pixels a picture is judged at
_CELL = SIDE // 16
_CROP = 32  # pixels of what the network sees: a small object's slot and one cell of surroundings, as they are
_FORMAT = 1  # raised when the same settings would train another judge
# Of the judge's training scenes: recoloured ones are the hardest, and every drawing has several paints.
_KINDS = {"single": 0.2, "recoloured": 0.3, "small": 0.12, "count": 0.13, "pair": 0.25}
_SURE = 0.5  # below this probability the judge names no concept: a blob is not the thing whose colour it has
_HERE = 0.5  # from this probability on an object counts as standing in its slot


class Slot(NamedTuple):
    """A square where an object can stand, in cells of a sixteenth of the side."""

    cells: int
    left: int
    top: int


class Layout(NamedTuple):
    """One way in which the world puts objects on slots; the slots are in the order of the things in a caption."""

    kind: str  # "single" stands for "recoloured" too
    slots: tuple[Slot, ...]
    relation: str | None = None
    positions: tuple[str | None, ...] = ()  # of the things: one, or two of a pair
    size: str | None = None


LAYOUTS: tuple[Layout, ...] = (
    Layout("single", (Slot(_LARGE, 2, 2),), positions=("centre",), size="large"),
    *(Layout("small", (Slot(_SMALL, *place),), positions=(name,), size="small") for name, place in _CORNERS.items()),
    *(Layout("count", tuple(Slot(_SMALL, *p) for p in places), positions=(None,)) for places in _COUNT_PLACES.values()),
    *(
        Layout("pair", tuple(Slot(_PAIR, *p) for p in places), relation, _PAIR_POSITIONS[relation])
        for relation, places in _PAIR_PLACES.items()
    ),
)
SLOTS: tuple[Slot, ...] = tuple(dict.fromkeys(slot for layout in LAYOUTS for slot in layout.slots))
# [layouts, S]: which slots a layout fills
_FILLED = torch.tensor([[slot in layout.slots for slot in SLOTS] for layout in LAYOUTS])


@dataclass(frozen=True)
class JudgeSettings:
    """How a judge is trained; the cache is keyed by all of it."""

    scenes_per_drawing: int = 100  # training scenes for each drawing (concept in a style), within the steps below
    least_steps: int = 600
    most_steps: int = 2400  # about 250 CPU-seconds
    batch_scenes: int = 32
    widths: tuple[int, int, int] = (24, 48, 96)
    learning_rate: float = 3e-3
    seed: int = 0


class Judgement(NamedTuple):
    """What the judge sees: `facts` in a scene's form (without style), `sure`: the mean log-probability of the slots."""

    facts: dict[str, Any]
    sure: float


class ObjectNet(nn.Module):
    """Crops [M, 3, 32, 32] in [-1, 1] -> concept logits [M, C], paint logits [M, 1 + paints] (0: its own), here [M]."""

    def __init__(self, concepts: int, widths: Sequence[int]):
        super().__init__()
        layers: list[nn.Module] = [nn.PixelUnshuffle(2)]
        before = 12
        for level, width in enumerate(widths):
            layers += [nn.Conv2d(before, width, 3, stride=2 if level else 1, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(width), nn.ReLU(), _Residual(width)]
            before = width
        self.trunk = nn.Sequential(*layers, nn.Flatten())
        self.features = nn.Sequential(nn.Linear(before * (_CROP // 8) ** 2, 256), nn.BatchNorm1d(256), nn.ReLU())
        self.concept = nn.Linear(256, concepts)
        self.paint = nn.Linear(256, 1 + len(PAINTS))
        self.here = nn.Linear(256, 1)

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen = self.features(self.trunk(crops))
        return self.concept(seen), self.paint(seen), self.here(seen).squeeze(1)


class _Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class Judge:
    """Reads pictures: `judge(pictures)`. `concepts` is what its network tells apart, in that order."""

    def __init__(self, net: ObjectNet, concepts: Sequence[Concept], *, device: str | torch.device = "cpu"):
        self.net, self.concepts, self.device = net.to(device).eval(), tuple(concepts), torch.device(device)

    @torch.no_grad()
    def __call__(self, pictures: np.ndarray, *, batch_size: int = 64) -> list[Judgement]:
        """uint8 [N, H, H, 3], H a multiple of 64 (larger ones are averaged down) -> N judgements.

        Raises ValueError for another shape or type.
        """
        if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[1] % SIDE or pictures.shape[3] != 3:
            raise ValueError(
                f"got pictures {pictures.dtype} {pictures.shape}, expected uint8 [N, H, H, 3], H a multiple of {SIDE}"
            )
        judged: list[Judgement] = []
        for start in range(0, len(pictures), batch_size):
            pixels = to_pixels(pictures[start : start + batch_size]).to(self.device)
            backgrounds = background_names(pixels)
            crops = torch.stack([crop(pixels, slot) for slot in SLOTS], 1).flatten(0, 1)
            concept, paint, here = (part.unflatten(0, (-1, len(SLOTS))).float().cpu() for part in self.net(crops))
            agreement = _agreement(here)
            for row, background in enumerate(backgrounds):
                layout = LAYOUTS[int(agreement[row].argmax())]
                facts = self._facts(layout, background, concept[row], paint[row], here[row].sigmoid())
                judged.append(Judgement(facts, float(agreement[row].max()) / len(SLOTS)))
        return judged

    def _facts(self, layout: Layout, background: str, concept: Tensor, paint: Tensor, here: Tensor) -> dict[str, Any]:
        """Facts in a scene's form; a slot of the layout where nothing stands is left out: three of four count three.

        What the judge can not name is concept None.
        """
        objects: list[dict[str, Any]] = []
        for index, slot in enumerate(layout.slots):
            at = SLOTS.index(slot)
            if here[at] < _HERE:
                continue
            sure, named = (part.item() for part in concept[at].softmax(-1).max(-1))
            chosen = int(paint[at].argmax())
            position = layout.positions[index] if layout.kind == "pair" else layout.positions[0]
            thing = {
                "concept": self.concepts[int(named)].name if sure >= _SURE else None,
                "colour": tuple(PAINTS)[chosen - 1] if chosen else None,
                "position": position,
                "size": layout.size,
            }
            same = next((known for known in objects if all(known[k] == v for k, v in thing.items())), None)
            if same is not None:
                same["count"] += 1
            else:
                objects.append({**thing, "count": 1})
        painted = layout.kind == "single" and any(thing["colour"] for thing in objects)
        kind = "recoloured" if painted else layout.kind
        return {"kind": kind, "background": background, "relation": layout.relation, "objects": objects}


def to_pixels(pictures: np.ndarray) -> Tensor:
    """uint8 [N, H, H, 3] -> float32 [N, 3, 64, 64] in [-1, 1]; larger pictures are averaged down."""
    pixels = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    factor = pixels.shape[-1] // SIDE
    return F.avg_pool2d(pixels, factor) if factor > 1 else pixels


def crop(pixels: Tensor, slot: Slot, *, shift: tuple[int, int] = (0, 0)) -> Tensor:
    """What the network sees of a slot, one cell of surroundings included: [N, 3, 64, 64] -> [N, 3, 32, 32]."""
    margin = 2 * _CELL  # one cell more than is shown, so that a shift stays inside
    padded = F.pad(pixels, (margin, margin, margin, margin), mode="replicate")
    top, left = ((start * _CELL - _CELL + margin + by) for start, by in zip((slot.top, slot.left), shift, strict=True))
    side = (slot.cells + 2) * _CELL
    cut = padded[:, :, top : top + side, left : left + side]
    return cut if side == _CROP else F.interpolate(cut, (_CROP, _CROP), mode="bilinear", antialias=True)


def background_names(pixels: Tensor) -> list[str]:
    """The named colour nearest to most pixels of the border, two wide: [N, 3, 64, 64] in [-1, 1] -> N names."""
    edge = torch.ones(pixels.shape[-2:], dtype=torch.bool)
    edge[2:-2, 2:-2] = False
    border = pixels[:, :, edge.to(pixels.device)].transpose(1, 2)
    palette = torch.tensor(list(BACKGROUNDS.values()), device=pixels.device).float() / 127.5 - 1
    votes = F.one_hot(torch.cdist(border, palette.expand(len(border), -1, -1)).argmin(-1), len(palette)).sum(1)
    names = tuple(BACKGROUNDS)
    return [names[index] for index in votes.argmax(-1).tolist()]


def _agreement(here: Tensor) -> Tensor:
    """Logits of "an object stands exactly here" [N, S] -> log-probability of every layout [N, layouts]."""
    return F.logsigmoid(here) @ _FILLED.float().T + F.logsigmoid(-here) @ (~_FILLED).float().T


# ---------------------------------------------------------------------------------------------------- training


def cached_judge(
    world: PictureWorld,
    settings: JudgeSettings,
    cache: Path,
    *,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Judge:
    """The judge of this world with these settings, from `cache` where it was trained before.

    The key holds the settings, the world's concepts, styles and drawings, its colours and its layouts.
    """
    key = {
        "format": _FORMAT, "settings": asdict(settings), "concepts": [concept.name for concept in world.concepts],
        "drawings": {style: _digest(world.drawings.directory / f"{style}.zip") for style in world.styles},
        "backgrounds": BACKGROUNDS, "paints": PAINTS, "layouts": LAYOUTS, "kinds": sorted(world.kind_weights),
    }  # fmt: skip
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = cache / f"judge-{name}.safetensors"
    net = ObjectNet(len(world.concepts), settings.widths)
    if path.is_file():
        with safe_open(path, framework="pt") as saved:
            net.load_state_dict({weight: saved.get_tensor(weight) for weight in saved.keys()})  # noqa: SIM118
        return Judge(net, world.concepts, device=device)
    judge = train_judge(world, settings, device=device, progress=progress)
    cache.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    weights = {weight: value.detach().cpu().contiguous() for weight, value in judge.net.state_dict().items()}
    save_file(weights, beside, metadata={"settings": json.dumps(asdict(settings))})
    os.replace(beside, path)
    return judge


def train_judge(
    world: PictureWorld, settings: JudgeSettings, *, device: str | torch.device = "cpu", progress: bool = True
) -> Judge:
    """Train a judge on scenes of `world`, each used once; the same settings give the same judge on one machine.

    Raises InputError unless the world has all compositions (see the top of this file) at 64 pixels.
    """
    if world.split != "all" or world.resolution != SIDE:
        raise InputError(
            f"The judge's world is the split {world.split!r} at {world.resolution} pixels, expected 'all' at {SIDE}: "
            "make a PictureWorld of that for it."
        )
    drawings = sum((style, concept.sequence) in world.drawings for style in world.styles for concept in world.concepts)
    steps = settings.scenes_per_drawing * drawings // settings.batch_scenes
    steps = max(settings.least_steps, min(settings.most_steps, steps))
    with torch.random.fork_rng():  # the weights' start depends on the seed, and nobody else's chances on this
        torch.manual_seed(settings.seed)
        net = ObjectNet(len(world.concepts), settings.widths).to(memory_format=torch.channels_last).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=settings.learning_rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps=steps, pct_start=0.1)
    batches = training_crops(world, steps, settings.batch_scenes, settings.seed)
    for crops, concept, paint, here in tqdm(batches, total=steps, desc="training the judge", disable=not progress):
        crops = crops.to(device, memory_format=torch.channels_last)
        concept, paint, here = concept.to(device), paint.to(device), here.to(device)
        concepts, paints, there = net(crops)
        loss = F.cross_entropy(concepts[here], concept[here], label_smoothing=0.05)
        loss = loss + F.cross_entropy(paints[here], paint[here])
        loss = loss + F.binary_cross_entropy_with_logits(there, here.float())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return Judge(net, world.concepts, device=device)


def training_crops(
    world: PictureWorld, steps: int, batch_scenes: int, seed: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Batches of softened crops [M, 3, 32, 32], concept [M], paint [M], here [M] bool.

    Of every scene at most two of its slots, and of two scenes in three one slot where nothing stands exactly.
    """
    number = {concept.name: index for index, concept in enumerate(world.concepts)}
    chance, noise = random.Random(seed), torch.Generator().manual_seed(seed)
    weights = {kind: weight for kind, weight in _KINDS.items() if kind in world.kind_weights}
    # far from the small seeds that models are trained on and measured with
    seeds = itertools.count((1 << 40) + (seed << 32))
    for _ in range(steps):
        kinds = chance.choices(tuple(weights), tuple(weights.values()), k=batch_scenes)
        scenes = [next(s for n in seeds if not is_kept_back(s := world.scene(n, kind))) for kind in kinds]
        pixels = soften(to_pixels(np.stack([scene.image for scene in scenes])), generator=noise)
        crops, labels = [], []
        for row, scene in enumerate(scenes):
            layout, things = layout_of(scene.facts), scene.facts["objects"]
            for index in chance.sample(range(len(layout.slots)), min(2, len(layout.slots))):
                thing = things[index if len(things) > 1 else 0]
                shift = (chance.randint(-1, 1), chance.randint(-1, 1))
                crops.append(crop(pixels[row : row + 1], layout.slots[index], shift=shift))
                paint = 1 + tuple(PAINTS).index(thing["colour"]) if thing["colour"] else 0
                labels.append((number[thing["concept"]], paint, 1))
            if chance.random() < 2 / 3:
                other = chance.choice([slot for slot in SLOTS if slot not in layout.slots])
                crops.append(crop(pixels[row : row + 1], other))
                labels.append((0, 0, 0))
        concept, paints, here = torch.tensor(labels).unbind(1)
        yield torch.cat(crops), concept, paints, here.bool()


def is_kept_back(scene: Scene) -> bool:
    """Whether a scene is kept back to measure the judge: a quarter of all that can be composed, by a hash of its facts.

    A judge never sees such a scene in training, whatever its seed: not this drawing in this colour on this background.
    """
    facts = json.dumps(scene.facts, sort_keys=True).encode()
    return hashlib.blake2b(facts, digest_size=4).digest()[0] % 4 == 0


def layout_of(facts: Mapping[str, Any]) -> Layout:
    """The layout that a scene with these facts has."""
    kind, first = ("single" if facts["kind"] == "recoloured" else facts["kind"]), facts["objects"][0]
    return next(
        layout
        for layout in LAYOUTS
        if layout.kind == kind
        and layout.relation == facts["relation"]
        and (kind != "small" or layout.positions == (first["position"],))
        and (kind != "count" or len(layout.slots) == first["count"])
    )


def _digest(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()[:16]
