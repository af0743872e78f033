"""Weights found where torch and the Hub keep them, fetched when asked, and refused in one sentence: a server of files
on this machine stands for those that publish them."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from mmdlm.cli import app
from mmdlm.errors import InputError
from mmdlm.evaluation import reconstruction
from mmdlm.evaluation.features import extractor
from mmdlm.evaluation.fetched_weights import clip_directory, published_hash, torch_file
from mmdlm.evaluation.reconstruction import lpips_network

NOWHERE = "http://127.0.0.1:9"  # the port of discard, which nobody listens at


class Files(ThreadingHTTPServer):
    """Serves `files` by path, half of those whose name says "cut", and the Hub's interface for one repository."""

    files: dict[str, bytes]
    repository, commit = "someone/tiny-clip", "0123456789abcdef0123456789abcdef01234567"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Files

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, here = self.path.partition("?")[0], self.server
        resolved = f"/{here.repository}/resolve/{here.commit}/"
        if path == f"/api/models/{here.repository}/revision/main":
            content = json.dumps({"id": here.repository, "sha": here.commit, "siblings": []}).encode()
        elif path.startswith(f"/api/models/{here.repository}/tree/"):
            listed = [{"type": "file", "path": name, "size": len(part), "oid": "0" * 40}
                      for name, part in here.files.items()]
            content = json.dumps(listed).encode()
        else:
            content = here.files.get(path.removeprefix(resolved).removeprefix("/"), b"")
        self.send_response(200 if content else 404)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", here.commit)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: len(content) // 2] if "-cut-" in path else content)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Files]:
    made = Files(("127.0.0.1", 0), Answers)
    made.files = {}
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torch keeps files, empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


def published(name: str, content: bytes) -> str:
    """A name that bears the content's hash, as torch's do."""
    return f"{name}-{hashlib.sha256(content).hexdigest()[:8]}.pth"


def ask(url: str, *, download: bool = False) -> Path:
    return torch_file(url, needs="A test needs weights", otherwise="or give --weights PATH", download=download)


def test_a_file_is_fetched_once_and_only_when_asked(server, cache):
    name = published("weights", b"content")
    server.files[name] = b"content"
    assert published_hash(name) == hashlib.sha256(b"content").hexdigest()[:8] and published_hash("plain.pth") == ""
    with pytest.raises(InputError, match=f"{name}, and it is not in .*checkpoints: put it there, .*--download, or gi"):
        ask(f"{server.url}/{name}")
    assert not cache.exists()
    assert ask(f"{server.url}/{name}", download=True).read_bytes() == b"content"
    server.files.clear()
    assert ask(f"{NOWHERE}/{name}", download=True) == ask(f"{NOWHERE}/{name}") == cache / name
    assert [path.name for path in cache.iterdir()] == [name]
    (cache / name).write_bytes(b"other")
    with pytest.raises(InputError, match=r"is not the published file .*: delete it"):
        ask(f"{NOWHERE}/{name}")


@pytest.mark.parametrize("fault", ["nobody", "missing", "cut", "other", "no address", "no room"])
def test_what_cannot_be_fetched_leaves_nothing(server, cache, fault):
    name = published("weights", b"content")
    at = {"nobody": NOWHERE, "no address": "htp://there"}.get(fault, server.url)
    if fault == "cut":
        name = published("weights-cut", bytes(100))
        server.files[name] = bytes(100)
    elif fault == "other":
        server.files[name] = b"something else"
    elif fault == "no room":
        server.files[name] = b"content"
        cache.parent.mkdir(parents=True)
        cache.write_text("a file where the folder should be")
    with pytest.raises(InputError, match=f"{name} could not be fetched from .*: bring it to .*, or give") as raised:
        ask(f"{at}/{name}", download=True)
    assert "\n" not in str(raised.value)
    assert fault == "no room" or not list(cache.iterdir())


def hollow(shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Weights of these shapes that take no room in a file: one number each."""
    return {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}


def saved(weights: dict[str, torch.Tensor], path: Path) -> bytes:
    torch.save(weights, path)
    return path.read_bytes()


def test_inception_from_the_cache_and_from_its_publisher(server, cache, tmp_path, monkeypatch):
    inception = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    saved({}, tmp_path / "none.pth")
    with monkeypatch.context() as patch, torch.device("meta"):
        patch.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        made = inception.FeatureExtractorInceptionV3("i", ["2048"], str(tmp_path / "none.pth"))
    shapes = {name: weight.shape for name, weight in made.state_dict().items()}
    content = saved(hollow(shapes), tmp_path / "other.pth")
    name = published("weights-inception", content)
    server.files[name] = content
    monkeypatch.setattr(inception, "URL_INCEPTION_V3", f"{server.url}/{name}")
    with pytest.raises(InputError, match=r"Inception network, .*--download.*--weights PATH.*--features random"):
        extractor("inception")
    fetched = extractor("inception", download=True)
    server.files.clear()
    assert fetched.is_inception and extractor("inception").name == fetched.name
    # by hand: the published file is as good, and another of the same network is told apart
    assert extractor("inception", weights=cache / name).name == fetched.name
    other = {**hollow(shapes), "fc.bias": torch.ones(()).expand(shapes["fc.bias"])}
    saved(other, tmp_path / "other.pth")
    with pytest.warns(UserWarning, match="is not the published weights-inception"):
        assert extractor("inception", weights=tmp_path / "other.pth").name != fetched.name


def test_alexnet_from_the_cache_and_from_its_publisher(server, cache, tmp_path, monkeypatch):
    pytest.importorskip("lpips")
    from torchvision.models import AlexNet_Weights, alexnet

    assert AlexNet_Weights.IMAGENET1K_V1.url == reconstruction.ALEXNET

    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in alexnet().state_dict().items()}
    content = saved(hollow(shapes), tmp_path / "alexnet.pth")
    name = published("alexnet", content)
    server.files[name] = content
    monkeypatch.setattr(reconstruction, "ALEXNET", f"{server.url}/{name}")
    with pytest.raises(InputError, match=r"LPIPS needs torchvision's AlexNet weights, the file alexnet-.*--lpips PATH"):
        lpips_network()
    lpips_network(download=True)
    server.files.clear()
    network = lpips_network()
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    assert float(network(x, -x)) == 0  # it sees nothing: all its weights are 0


@pytest.fixture
def hub(server: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hub's cache, empty, and `server` in the Hub's place."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    return tmp_path / "hub"


def test_a_clip_by_its_name(server, hub, tmp_path, monkeypatch):
    from huggingface_hub import constants

    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    server.files = {"config.json": b"{}", "evil.py": b"raise SystemExit", "pytorch_model.bin": b"pickle"}
    with pytest.raises(InputError, match=r"is no directory, and its model.safetensors is not in .*--download, or give"):
        clip_directory(Files.repository)
    with pytest.raises(InputError, match=f"has no model.safetensors on the Hub, .*{Files.repository}@REVISION"):
        clip_directory(Files.repository, download=True)
    server.files["model.safetensors"] = (tmp_path / "model.safetensors").read_bytes()
    Files.commit = "f" + Files.commit[1:]  # the publisher has added them
    found = clip_directory(Files.repository, download=True)
    assert sorted(path.name for path in found.iterdir()) == ["config.json", "model.safetensors"]
    server.files.clear()
    assert clip_directory(Files.repository) == found == clip_directory(found)
    monkeypatch.setattr(constants, "ENDPOINT", NOWHERE)
    with pytest.raises(InputError, match=f"someone/other could not be fetched from {NOWHERE} to .*hub"):
        clip_directory("someone/other", download=True)
    with pytest.raises(InputError, match="There is no directory"):
        clip_directory(tmp_path / "nowhere")


def test_the_commands_say_what_is_missing(cache, tmp_path, monkeypatch):
    inception = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    from PIL import Image

    monkeypatch.setattr(inception, "URL_INCEPTION_V3", f"{NOWHERE}/weights-inception-2015-12-05-6726825d.pth")
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(2):
        Image.new("RGB", (16, 16)).save(folder / f"{number}.png")
    for arguments, words in [
        (("images", folder, folder), "fetch it with --download"),
        (("images", folder, folder, "--download"), "could not be fetched from http://127.0.0.1:9/weights-inception"),
        (("tokenizer", folder, "--features", "inception"), "fetch it with --download"),
        (("tokenizer", folder, "--lpips", "alexnet"), "alexnet-owt-7be5be79.pth, and it is not in"),
        (("images", folder, folder, "--features", "random"), "2 generated and 2 reference pictures for 128 features"),
    ]:
        result = CliRunner().invoke(app, ["eval", *map(str, arguments), "-o", str(tmp_path / "out"), "--quiet"])
        assert result.exit_code == 2 and words in result.output, result.output
        assert result.output.startswith("mmdlm: ") and result.output.count("\n") == 1
        assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("*.pth"))
