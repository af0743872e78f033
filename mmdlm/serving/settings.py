"""What a server allows, and what it refuses to start with."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from mmdlm.errors import InputError


@dataclass(frozen=True)
class Limits:
    """Bounds on what one request and one client may take. InputError for a bound below 1."""

    body_bytes: int = 20 * 2**20
    picture_pixels: int = 16 * 2**20
    bodies_bytes: int = 512 * 2**20  # of all requests that are being answered
    rows: int = 16  # pictures drawn, captions or answers of one request
    budget: int = 16384  # tokens of one forward, over all requests
    queue: int = 256  # rows that wait
    seconds: float = 120.0  # from the request's first byte to its answer's last
    idle_seconds: float = 30.0  # a head may take, a body be without a byte, an answer lie unread
    requests_per_minute: int | None = None  # of one client
    requests_at_once: int | None = None  # of one client

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not value > 0:
                raise InputError(f"The limit {name} is {value}, expected more than 0: leave it out for the usual one.")


def read_keys(path: Path) -> dict[str, str]:
    """A key file -> {key: its client's name}. A line is `NAME KEY` or `KEY`; empty ones and `# ...` do not count.

    Raises InputError where the file cannot be read, holds no key, a short one or one twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The key file {path} cannot be read ({error}): give a text file, one key a line.") from None
    keys: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        key = words[-1]
        # the key itself is never repeated in a message: messages end in logs
        if len(words) > 2 or len(key) < 16 or not key.isascii():
            raise InputError(
                f"Line {number} of the key file {path} is no key, expected KEY or NAME KEY with a key of 16 ASCII "
                "characters or more: `openssl rand -hex 24` makes one."
            )
        if key in keys:
            raise InputError(f"Line {number} of the key file {path} repeats a key: give every client its own.")
        keys[key] = words[0] if len(words) == 2 else f"key {number}"
    if not keys:
        raise InputError(f"The key file {path} holds no key: write one a line, or leave --api-key-file out.")
    return keys


def is_loopback(host: str) -> bool:
    """Can only this machine reach `host`? False for names other than localhost."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
