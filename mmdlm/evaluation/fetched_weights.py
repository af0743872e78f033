"""Weights that metrics need and others publish: where torch and the Hub keep them, or fetched to there when asked.

Nothing is fetched unless `download` says so. A file of torchvision's or torch-fidelity's lies where these would put it
themselves, $TORCH_HOME/hub/checkpoints, under a name that bears the beginning of its SHA-256: it is compared when the
file is fetched and when it is found. A CLIP lies in the Hub's cache ($HF_HOME/hub); of its repository configuration,
tokenizer and safetensors are asked for, and no program or pickle ever.
"""

from __future__ import annotations

import hashlib
import http.client
import pickle
import re
import socket
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.error import URLError
from urllib.parse import urlsplit

import torch

from mmdlm.errors import InputError

HUB_FILES = ("*.json", "*.txt", "model*.safetensors")
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,})\.[a-z]+$")
_HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_PATIENCE = 30.0  # seconds without an answer


def file_name(url: str) -> str:
    return PurePosixPath(urlsplit(url).path).name


def published_hash(url: str) -> str:
    """The beginning of the SHA-256 that the file's name bears; "" where it bears none."""
    found = _HASH_IN_NAME.search(file_name(url))
    return found[1] if found else ""


def torch_file(url: str, *, needs: str, otherwise: str, download: bool = False, progress: bool = False) -> Path:
    """The file of this address in torch's cache; where it is not there and `download`, fetched into it first.

    needs: who needs what, the beginning of the sentence that says that it is not there. otherwise: what a person may
    do instead of putting it there. Raises InputError where it is not there, cannot be fetched, or is another file.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path, expected = folder / file_name(url), published_hash(url)
    if path.is_file():
        found = file_hash(path)[: len(expected)]
        if found != expected:
            raise InputError(
                f"{path} is not the published file (its SHA-256 begins with {found}, expected {expected}): delete it "
                "and fetch it again."
            )
        return path
    if not download:
        raise InputError(
            f"{needs}, the file {path.name}, and it is not in {folder}: put it there, fetch it with --download, "
            f"{otherwise}."
        )
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_PATIENCE)  # torch's own would wait for a silent network for ever
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # written beside its place, compared, and then renamed; what is not whole is deleted
        torch.hub.download_url_to_file(url, str(path), expected or None, progress=progress)
    except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
        raise InputError(
            f"{path.name} could not be fetched from {url} ({_reason(error)}): bring it to {folder} by other means, "
            f"{otherwise}."
        ) from error
    finally:
        socket.setdefaulttimeout(before)
    return path


def clip_directory(clip: str | Path, *, download: bool = False) -> Path:
    """The directory of a CLIP: one that is given, or that of a Hub's name (OWNER/NAME or OWNER/NAME@REVISION) in the
    Hub's cache; where it is not there and `download`, fetched into it first.

    Raises InputError where it is neither, cannot be fetched, or has no safetensors.
    """
    named = _HUB_NAME.fullmatch(str(clip))
    if Path(clip).is_dir():
        return Path(clip)
    if named is None or Path(clip).exists():
        raise InputError(
            f"There is no directory {clip}: give that of a CLIP, or a name of the Hub such as "
            "openai/clip-vit-large-patch14."
        )
    from huggingface_hub import constants, snapshot_download

    name, revision = named[1], named[2]
    into = Path(constants.HF_HUB_CACHE)
    by_hand = "give a directory with its config.json, model.safetensors, tokenizer and preprocessor_config.json"
    try:
        kept = Path(snapshot_download(name, revision=revision, allow_patterns=list(HUB_FILES), local_files_only=True))
    except Exception:  # the client raises a dozen kinds; each means that it is not there, or not whole
        kept = into / "none"
    if _has_safetensors(kept):
        return kept
    if not download:
        raise InputError(
            f"CLIPScore needs {clip}, which is no directory, and its model.safetensors is not in {into}: fetch it with "
            f"--download, or {by_hand}."
        )
    try:
        fetched = Path(snapshot_download(name, revision=revision, allow_patterns=list(HUB_FILES)))
    except Exception as error:
        raise InputError(
            f"{clip} could not be fetched from {constants.ENDPOINT} to {into} ({_reason(error)}): check the name and "
            f"the network, or {by_hand}."
        ) from error
    if not _has_safetensors(fetched):
        raise InputError(
            f"{clip} has no model.safetensors on the Hub, and weights of other kinds are not taken: name a revision "
            f"that has them, {name}@REVISION, or another such as openai/clip-vit-large-patch14."
        )
    return fetched


def tensors_of(path: Path) -> dict[str, Any]:
    """What a file of torch's holds, tensors only. ValueError for one that holds anything else, or is none."""
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, EOFError) as error:  # their words are about pickle, which nobody asked for
        raise ValueError("it is no file of tensors") from error
    if not isinstance(content, dict):
        raise ValueError("it is no table of tensors")
    return content


def file_hash(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _has_safetensors(directory: Path) -> bool:
    return any(directory.glob("model*.safetensors"))


def _reason(error: BaseException) -> str:
    """What a library says of its failure, on one line."""
    if isinstance(error, URLError) and isinstance(error.reason, OSError):
        error = error.reason
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0][:160].rstrip(".:")
