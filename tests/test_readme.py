"""The README tells the truth: its two commands, the commands and options it shows, its code, its tree and its links."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from mmdlm.programs import program_path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# rooms whose files the tree does not name one by one
ROOMS = ("assets", "convert", "data", "training", "evaluation", "serving", "cli", "pipelines")
FOLDERS = tuple(f"mmdlm/{room}/" for room in ROOMS)


def block(marker: str) -> str:
    """The fenced block right after the comment `<!-- marker -->`."""
    (found,) = re.findall(rf"<!-- {re.escape(marker)} -->\n```\w*\n(.*?)```", README, flags=re.DOTALL)
    return found


def shell_lines() -> list[str]:
    """Every single command of the README's shell blocks; `&&` joins two."""
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", README, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [part.strip() for line in lines for part in line.split(" && ") if part.strip()]


def tree_entries() -> dict[str, str]:
    """Path -> what the README's tree says about it. Two spaces of indent are one level; a folder ends in /."""
    entries: dict[str, str] = {}
    parents: list[str] = []
    for line in block("tree").splitlines():
        name, _, about = line.strip().partition(" ")
        if not name:
            continue
        level = (len(line) - len(line.lstrip())) // 2
        parents[level:] = [name.rstrip("/")]
        entries["/".join(parents) + ("/" if name.endswith("/") else "")] = about.strip()
    return entries


def test_the_two_commands_come_first_and_are_what_ci_runs():
    commands = ['pip install -e . && mmdlm generate "a red apple" -o apple.png', 'pip install -e ".[test]" && pytest']
    assert shell_lines()[:4] == [part for command in commands for part in command.split(" && ")]
    for name, command in zip(("run", "test"), commands, strict=True):
        extract = [sys.executable, str(ROOT / ".ci" / "readme_command.py"), name]
        assert subprocess.run(extract, check=True, capture_output=True, text=True).stdout.strip() == command
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert 'readme_command.py run)\n' in script and 'readme_command.py test)\n' in script


def help_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    """What `mmdlm WORDS --help` prints; the test fails when there is no such command."""
    from mmdlm.cli import main

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys, "argv", ["mmdlm", *words, "--help"])
    with pytest.raises(SystemExit) as stopped:
        main()
    printed = capsys.readouterr()
    assert stopped.value.code in (0, None), f"mmdlm {' '.join(words)}: {printed.err}"
    return re.sub(r"\x1b\[[\d;]*m", "", printed.out)  # typer colours its help on some build machines


def test_every_command_and_option_shown_exists(monkeypatch, capsys):
    inline = re.findall(r"`(mmdlm [^`]+)`", README)
    shown = [line for line in [*shell_lines(), *inline] if line.startswith("mmdlm ")]
    assert shown
    for line in shown:
        words = shlex.split(line, comments=True)[1:]
        if words[0] in ("run", "path") and len(words) > 1:  # what follows the program's name is the program's own
            assert program_path(words[1]).is_file(), line
            continue
        command = words[: {"data": 3, "eval": 2}.get(words[0], 1)]
        usage = help_of(monkeypatch, capsys, command)
        for option in (word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)):
            assert re.search(rf"(?<!\S){option}\b", usage), f"{line}: no option {option}"


def test_programs_shown_exist():
    for line in shell_lines():
        for path in re.findall(r"(?:^|\s)((?:tokenizers|train|eval|tools|\.ci)/[\w./-]+)", line):
            # `mmdlm run` names a program without its ending
            assert (ROOT / path).is_file() or (ROOT / f"{path}.py").is_file(), line


def test_the_code_draws_a_picture(monkeypatch, tmp_path):
    from PIL import Image

    source = block("python: draw")
    assert len([line for line in source.splitlines() if line.strip()]) <= 20
    monkeypatch.chdir(tmp_path)
    exec(compile(source, "README.md", "exec"), {})
    with Image.open("apple.png") as picture:
        assert picture.size[0] == picture.size[1] >= 64
        assert len(picture.convert("RGB").getcolors(maxcolors=1 << 16) or []) > 1


def test_the_tree_shows_what_is_there():
    entries = tree_entries()
    assert "mmdlm/vocabulary.py" in entries
    for path in entries:
        assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file(), f"{path} is in the tree only"
    for path in sorted((ROOT / "mmdlm").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if path.name != "__init__.py" and not name.startswith(FOLDERS):
            assert name in entries, f"{name} is missing in the README's tree"
    assert [path for path, about in entries.items() if not about] == []


def test_the_floors_in_the_tree_are_those_of_the_style_page():
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (ground|\d) \| (.*) \|$", page, flags=re.MULTILINE)
    floors = {room: floor for floor, rooms in rows for room in re.findall(r"`(\w+/?)`", rooms.split(":")[0])}
    for path, about in tree_entries().items():
        parts = path.rstrip("/").split("/")
        if parts[0] == "mmdlm" and len(parts) == 2:
            room = parts[1].removesuffix(".py") + ("/" if path.endswith("/") else "")
            if room in floors:
                assert about.split()[0] == floors[room], f"{path}: floor {floors[room]}, the tree says {about!r}"


def test_links_lead_somewhere():
    titles = re.findall(r"^#+ (.*)", README, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}
    for target in re.findall(r"\]\(([^)\s]+)\)", README) + re.findall(r'src="([^"]+)"', README):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif "://" not in target:
            assert (ROOT / target.split("#")[0]).exists(), target


def test_python_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["requires-python"] == ">=3.11" and "Python 3.11" in README


def test_nothing_is_left_to_be_filled():
    assert "to be filled" not in README
