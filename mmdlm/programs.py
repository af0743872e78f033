"""Where the programs lie: the files of tokenizers/, train/ and eval/, in a checkout and in an installed package.

In a checkout they stand beside the package; the wheel carries them as data at ``mmdlm/recipes/``. The library never
imports them, it only tells where they are, as in ``accelerate launch "$(mmdlm path train/supervised)"``.
"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from mmdlm.errors import InputError

PROGRAM_FOLDERS = ("tokenizers", "train", "eval")
RUNNABLE = (".py", ".sh")  # a name without a suffix means the first of these that exists


def program_path(name: str) -> Path:
    """The absolute path of the program `name`, for example ``train/supervised``.

    With its suffix a name may be any file of a program folder: ``train/pictures.yaml``. Raises InputError for a name
    that is none, with the nearest ones.
    """
    root = _programs_root()
    folder, _, rest = name.partition("/")
    candidates = (root / folder / (rest + suffix) for suffix in ("", *RUNNABLE))
    # A name that leaves its folder ("train/../../x") is no program, whatever lies there.
    if folder in PROGRAM_FOLDERS and rest and ".." not in Path(rest).parts:
        for path in candidates:
            if path.is_file():
                return path
    known = list_programs()
    nearest = get_close_matches(name.removesuffix(".py"), known, n=3, cutoff=0.5) or known
    raise InputError(f"There is no program {name!r}: expected one such as {', '.join(nearest)}; `mmdlm ls` lists them.")


def list_programs() -> list[str]:
    """The names of all programs, without suffix, sorted: what `program_path` takes."""
    root = _programs_root()
    return sorted(
        path.relative_to(root).with_suffix("").as_posix()
        for folder in PROGRAM_FOLDERS
        for path in (root / folder).rglob("*")
        if path.suffix in RUNNABLE
    )


def _programs_root() -> Path:
    package = Path(__file__).resolve().parent
    recipes = package / "recipes"  # only the wheel has it; an editable install imports the checkout's package
    return recipes if recipes.is_dir() else package.parent
