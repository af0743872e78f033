"""The page: one HTML document without anything from elsewhere, and the policy that keeps it so.

`page.html` is what it holds, `page.css` how it looks, and what it does is in `page.js` (tabs, requests, history),
`page_results.js` (frames, confidence maps, texts), `page_mask.js` (the brush) and `page_tasks.js` (the forms). They are
sent as one document, so that the page needs one request and no key.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from functools import cache
from importlib.resources import files

from mmdlm.assets import shipped_model
from mmdlm.errors import InputError
from mmdlm.model_directory import model_hash


@cache
def page() -> str:
    """The page's HTML, its styles and scripts inside."""
    text = _read("page.html")
    text = re.sub(r'<link rel="stylesheet" href="([\w.]+)">', lambda found: f"<style>{_read(found[1])}</style>", text)
    text = re.sub(r'<script src="([\w.]+)"></script>', lambda found: f"<script>{_read(found[1])}</script>", text)
    # The page says `--model` in a command where the server runs another model than the command would.
    return text.replace('data-shipped=""', f'data-shipped="{html.escape(_shipped_hash())}"', 1)


@cache
def page_policy() -> str:
    """Its content security policy: its own scripts and styles, by their hashes, and requests to its own server."""
    hashes = {
        tag: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
            for content in re.findall(f"<{tag}>(.*?)</{tag}>", page(), re.DOTALL)
        )
        for tag in ("script", "style")
    }
    return (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; "
        "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _read(name: str) -> str:
    return (files("mmdlm.serving") / name).read_text(encoding="utf-8")


def _shipped_hash() -> str:
    try:
        return model_hash(shipped_model())
    except InputError:  # an installation without the shipped model: every command names its model
        return ""
