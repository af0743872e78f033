"""The page's parts: sent as one document that needs nothing from elsewhere and breaks no rule of its own policy."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

import mmdlm.serving
from mmdlm.assets import shipped_model
from mmdlm.model_directory import model_hash
from mmdlm.serving.page import page, page_policy

PARTS = sorted(Path(mmdlm.serving.__file__).parent.glob("page*"))


def test_every_part_is_in_the_page_and_named_by_its_hash():
    text, policy = page(), page_policy()
    assert len(re.findall("<script>", text)) == 4 and len(re.findall("<style>", text)) == 1
    assert "src=" not in re.sub("<script>.*?</script>", "", text, flags=re.DOTALL)
    for part in PARTS:
        if part.suffix in (".css", ".js"):
            content = part.read_text(encoding="utf-8")
            digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
            assert content in text and f"'sha256-{digest}'" in policy
    assert "unsafe" not in policy and policy.startswith("default-src 'none'; script-src 'sha256-")
    assert f'data-shipped="{model_hash(shipped_model())}"' in text


def test_no_part_names_another_host_or_does_what_the_policy_forbids():
    for part in PARTS:
        text = part.read_text(encoding="utf-8")
        assert not re.search(r"https?://|\burl\(|@import|innerHTML|insertAdjacent|\beval\(|new Function", text), part
        assert len(text.splitlines()) <= 400
    markup = next(part for part in PARTS if part.suffix == ".html").read_text(encoding="utf-8")
    assert not re.search(r"\s(style|on[a-z]+)=", markup)
    named = set(re.findall(r'aria-controls="([\w-]+)"', markup))
    ids = re.findall(r'\sid="([\w-]+)"', markup)
    assert named <= set(ids) and len(ids) == len(set(ids))
    script = "".join(part.read_text(encoding="utf-8") for part in PARTS if part.suffix == ".js")
    assert set(re.findall(r'find\("#([\w-]+)"\)', script)) <= set(ids)
