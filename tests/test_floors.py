"""The floors of the house: who may import whom (CONTRIBUTING.md, "Where a thing belongs")."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAM_FOLDERS = ("tokenizers", "train", "eval")

# The whole plan, rooms still to be built included. errors is the ground: everybody stands on it.
GROUND = -1
FLOORS = {
    "errors": GROUND,
    "vocabulary": 0,
    "text_tokenizer": 0,
    "schedules": 0,
    "config": 0,
    "programs": 0,
    "assets": 0,
    "model_directory": 0,
    "picture_files": 0,
    "picture_reading": 0,
    "sequence": 1,
    "corruption": 1,
    "attention": 1,
    "templates": 1,
    "objectives": 2,
    "models": 2,
    "sampling": 3,
    "processing": 4,
    "prompts": 4,
    "convert": 4,
    "data": 4,
    "training": 4,
    "pipelines": 5,
    "evaluation": 5,
    "serving": 6,
    "cli": 7,
}


def library_files() -> list[Path]:
    return sorted((ROOT / "mmdlm").rglob("*.py"))


def program_files() -> list[Path]:
    return sorted(path for folder in PROGRAM_FOLDERS for path in (ROOT / folder).rglob("*.py"))


def room_of(path: Path) -> str:
    """mmdlm/models/lfq.py -> models; mmdlm/cli/words.py -> cli."""
    return path.relative_to(ROOT / "mmdlm").parts[0].removesuffix(".py")


def package_of(path: Path) -> str:
    """The package that relative imports of this file start from: mmdlm/models/lfq.py -> mmdlm.models."""
    return ".".join(path.relative_to(ROOT).parent.parts)


def imported(source: str, package: str = "mmdlm") -> set[str]:
    """Dotted names that `source`, a module of `package`, imports: at the top, lazily, for types, through importlib."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # `from mmdlm import vocabulary` names the module in its second half
            names.update(f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__"):
                names.add(str(node.args[0].value))
    return names


def too_high(room: str, names: set[str]) -> list[str]:
    """Imports of `room` that are neither on a lower floor nor in the room itself."""
    parts = [name.split(".") for name in sorted(names) if name.split(".")[0] == "mmdlm"]
    return [
        ".".join(part)
        for part in parts
        if len(part) > 1 and part[1] in FLOORS and part[1] != room and FLOORS[part[1]] >= FLOORS[room]
    ]


def imports_program(names: set[str]) -> list[str]:
    """Imports that name a program, by its folder or by its bare file name; Hugging Face's `tokenizers` is none."""
    stems = {path.stem for path in program_files()}
    found = []
    for name in sorted(names):
        first, _, rest = name.partition(".")
        in_folder = first in ("train", "eval") or (first == "tokenizers" and rest.split(".")[0] in stems)
        if in_folder or first in stems or name.startswith("mmdlm.recipes"):
            found.append(name)
    return found


def test_the_reader_of_imports_sees_every_kind():
    source = (
        "import mmdlm.data.scenes\n"
        "from mmdlm import pipelines\n"
        "def late():\n"
        "    from mmdlm.sampling.denoise import denoise\n"
        "    from . import cli\n"
        "    from ..config import load\n"
        "    import_module('train.supervised')\n"
    )
    names = imported(source, package="mmdlm.models")
    assert names == {
        "mmdlm.data.scenes",
        "mmdlm.pipelines",
        "mmdlm.sampling.denoise.denoise",
        "mmdlm.models.cli",
        "mmdlm.config.load",
        "train.supervised",
    }
    assert too_high("models", names) == ["mmdlm.data.scenes", "mmdlm.pipelines", "mmdlm.sampling.denoise.denoise"]
    assert too_high("cli", names) == []
    assert imports_program(names | {"tokenizers.models", "torch"}) == ["train.supervised"]


def test_every_room_has_a_floor():
    rooms = {room_of(path) for path in library_files()} - {"__init__"}
    assert rooms - FLOORS.keys() == set(), "give each new room a floor, here and in CONTRIBUTING.md"


def test_the_floors_are_those_of_the_style_page():
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (ground|\d) \| (.*) \|$", page, flags=re.MULTILINE)
    written = {
        room.rstrip("/"): GROUND if floor == "ground" else int(floor)
        for floor, rooms in rows
        if floor != "8"
        for room in re.findall(r"`(\w+/?)`", rooms.split(":")[0])
    }
    assert written == FLOORS


@pytest.mark.parametrize("path", library_files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_module_imports_only_from_lower_floors(path: Path):
    room, names = room_of(path), imported(path.read_text(encoding="utf-8"), package_of(path))
    if room != "__init__":  # the package's front door names its public parts, lazily
        assert too_high(room, names) == []
    assert imports_program(names) == []


def test_programs_import_no_other_program():
    for path in program_files():
        names = imported(path.read_text(encoding="utf-8"))
        assert imports_program(names) == [], path.relative_to(ROOT)
