"""The page: one HTML file without anything from elsewhere, and the policy that keeps it so."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files


@cache
def page() -> str:
    """The page's HTML."""
    return (files("mmdlm.serving") / "page.html").read_text(encoding="utf-8")


@cache
def page_policy() -> str:
    """Its content security policy: its own script and style, by their hashes, and requests to its own server."""
    hashes = {}
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", page(), re.DOTALL)
        hashes[tag] = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; "
        "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
