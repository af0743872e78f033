"""The package: what it declares, what its wheel carries, and that the wheel works outside the checkout."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import mmdlm
from mmdlm.programs import PROGRAM_FOLDERS, list_programs, program_path

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# where the name of an import is not the name of its distribution
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml"}
ONLY_TO_BUILD_DATA = {"resvg-py"}
# rooms and files that may import what extras bring
CARRIED = {"pyarrow"}  # by datasets, whose tables these are
EXTRAS_OF_ROOM = {"evaluation": ["eval"], "serving": ["serve", "ray"]}
EXTRAS_OF_FILE = {
    "data/tokenize.py": ["ray"],
    "sampling/formats.py": ["formats"],
    "evaluation/lmms_harness.py": ["harnesses"],
    "cli/lm_harness.py": ["harnesses"],
    "cli/lmms_model.py": ["harnesses"],
}


def declared(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-") for requirement in requirements}


class WithoutTypeChecking(ast.NodeTransformer):
    """Drops the bodies of `if TYPE_CHECKING:`, which never run."""

    def visit_If(self, node: ast.If) -> ast.If | None:
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else node


def third_party(path: Path) -> set[str]:
    """Distributions that a file imports when it runs, at the top or lazily."""
    names: set[str] = set()
    for node in ast.walk(WithoutTypeChecking().visit(ast.parse(path.read_text(encoding="utf-8")))):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").split(".")[0])
    foreign = names - set(sys.stdlib_module_names) - {"mmdlm"}
    return {DISTRIBUTIONS.get(name, name).lower().replace("_", "-") for name in foreign}


def test_no_folder_of_ours_can_shadow_hugging_face_tokenizers():
    for folder in (*PROGRAM_FOLDERS, "tests"):
        assert list((ROOT / folder).rglob("__init__.py")) == []
    spec = importlib.util.find_spec("tokenizers")
    assert spec is not None and spec.origin is not None and not Path(spec.origin).is_relative_to(ROOT / "tokenizers")


def test_program_names_are_unique_and_importable_packages_have_none_of_them():
    stems = [path.stem for folder in PROGRAM_FOLDERS for path in (ROOT / folder).rglob("*.py")]
    assert len(stems) == len(set(stems))
    assert [stem for stem in stems if importlib.util.find_spec(stem)] == []


def test_what_is_imported_is_declared_as_lower_bounded_ranges():
    base = declared(PYPROJECT["project"]["dependencies"])
    extras = PYPROJECT["project"]["optional-dependencies"]
    for path in (ROOT / "mmdlm").rglob("*.py"):
        inside = path.relative_to(ROOT / "mmdlm")
        named = EXTRAS_OF_ROOM.get(inside.parts[0], []) + EXTRAS_OF_FILE.get(inside.as_posix(), [])
        more = set().union(*(declared(extras[extra]) for extra in named))
        assert third_party(path) <= base | ONLY_TO_BUILD_DATA | CARRIED | more, path.relative_to(ROOT)
    optional = base | set().union(*(declared(extras[name]) for name in extras if name != "test"))
    for folder in PROGRAM_FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            assert third_party(path) <= optional, path.relative_to(ROOT)
    assert [line for line in PYPROJECT["project"]["dependencies"] if not re.fullmatch(r"[\w.-]+>=[\d.]+", line)] == []


def test_public_names_are_lazy():
    heavy = "{'torch', 'transformers', 'diffusers', 'numpy'}"
    code = f"import sys, mmdlm; assert mmdlm.InputError.__name__ == 'InputError'; print({heavy} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert printed.strip() == "set()"
    with pytest.raises(AttributeError, match="'mmdlm' has no attribute 'nothing'"):
        _ = mmdlm.nothing


@pytest.mark.parametrize("name", sorted(set(mmdlm.__all__) - {"__version__"}))
def test_every_public_name_is_there(name: str):
    assert getattr(mmdlm, name).__name__ == name


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("mmdlm-*.whl")
    return built


def test_the_wheel_carries_the_programs_and_the_model(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {"mmdlm", f"mmdlm-{mmdlm.__version__}.dist-info"}
    for path in (ROOT / "mmdlm").rglob("*"):
        if path.suffix in (".py", ".json", ".jsonl", ".safetensors"):
            assert path.relative_to(ROOT).as_posix() in names
    for program in list_programs():
        assert f"mmdlm/recipes/{program_path(program).relative_to(ROOT).as_posix()}" in names
    assert {"mmdlm/py.typed", "mmdlm/recipes/tools/fetch_pictures.sh"} <= names
    # eval/results holds the small results that eval/README.md is written from
    recipes = {Path(name).suffix for name in names
               if name.startswith("mmdlm/recipes/") and not name.startswith("mmdlm/recipes/eval/results/")}
    assert recipes <= {".py", ".sh", ".yaml", ".md"}, "a program wrote its results beside itself"


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The scripts folder of a fresh environment that holds the wheel, and sees this one's torch and the rest."""
    environment = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    scripts = environment / ("Scripts" if os.name == "nt" else "bin")
    python = str(scripts / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, check=True)
    # Only now: pip would take this environment's editable mmdlm for the one to replace. A folder that a .pth names
    # has its own .pth files ignored, so the checkout does not come in with it.
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = Path(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip())
    paths = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    (own / "dependencies.pth").write_text("\n".join(paths))
    yield scripts


def run_installed(scripts: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(
        [str(scripts / arguments[0]), *arguments[1:]], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_the_wheel_works_outside_the_checkout(installed: Path, tmp_path: Path):
    where = run_installed(installed, "python", "-c", "import mmdlm; print(mmdlm.__file__)", cwd=tmp_path)
    assert Path(where.stdout.strip()).is_relative_to(installed.parent), where.stderr

    usage = run_installed(installed, "mmdlm", "--help", cwd=tmp_path)
    assert usage.returncode == 0 and "generate" in usage.stdout, usage.stderr

    found = run_installed(installed, "mmdlm", "path", "train/supervised", cwd=tmp_path)
    program = Path(found.stdout.strip())
    assert found.returncode == 0, found.stderr
    assert program.is_relative_to(installed.parent) and program.match("mmdlm/recipes/train/supervised.py")

    drawn = run_installed(installed, "mmdlm", "generate", "a red apple", "-o", "apple.png", cwd=tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "apple.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["apple.png"]
