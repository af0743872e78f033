"""Print the shell command that README.md shows under the marker `<!-- command: NAME -->`.

The continuous integration runs what the README says, and nothing that resembles it.
Usage: python .ci/readme_command.py NAME
"""

from __future__ import annotations

import re
import sys
from pathlib import Path


def readme_command(readme: str, name: str) -> str:
    """The one line of the fenced block right after the marker. ValueError when that is not what stands there."""
    found = re.findall(rf"<!-- command: {re.escape(name)} -->\s*\n```(?:bash|sh)\n(.*?)\n```", readme, flags=re.DOTALL)
    if len(found) != 1 or "\n" in found[0].strip():
        raise ValueError(f"README.md has {len(found)} fenced blocks for {name!r}, expected one block of one line")
    return found[0].strip()


if __name__ == "__main__":
    print(readme_command(Path(__file__).parent.parent.joinpath("README.md").read_text(encoding="utf-8"), sys.argv[1]))
