"""What deploy/ says is true of the program: its YAML parses, its commands, paths, ports and users agree."""

from __future__ import annotations

import inspect
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from mmdlm.cli import app
from mmdlm.serving import metrics, server
from mmdlm.serving.settings import Limits, read_keys

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
PORT = 8000


@pytest.fixture(scope="module")
def dockerfile() -> list[tuple[str, str]]:
    """(instruction, its words) in order."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.split(None, 1)[1]) for line in text.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def options() -> set[str]:
    """The options of `mmdlm serve`."""
    said = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, ["serve", "--help"]).stdout
    return set(re.findall(r"--[a-z][a-z-]*", said))


@pytest.fixture(scope="module")
def compose() -> dict:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


@pytest.fixture(scope="module")
def kubernetes() -> dict[str, dict]:
    return {part["kind"]: part for part in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}


def named(words: list[str]) -> set[str]:
    return {word for word in words if word.startswith("--")}


def routes() -> set[str]:
    return set(re.findall(r'app\.(?:get|post)\("(/[^"{]*)"', inspect.getsource(server)))


def test_the_image_copies_what_is_there_and_starts_what_exists(dockerfile, options):
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    for instruction, words in dockerfile:
        if instruction == "COPY" and "--from" not in words:
            for source in words.split()[:-1]:
                assert (ROOT / source).exists() and f"!{source}" in ignored
    last = dict(dockerfile)  # of each instruction, the last
    entry, arguments = json.loads(last["ENTRYPOINT"]), json.loads(last["CMD"])
    assert entry[:2] == ["mmdlm", "serve"] and named(entry + arguments) <= options
    assert entry[entry.index("--port") + 1] == last["EXPOSE"] == str(PORT)
    assert last["USER"] == "mmdlm" and f":{PORT}/ready" in last["HEALTHCHECK"] and "/ready" in routes()
    assert dict(dockerfile)["RUN"].startswith("useradd --system --uid 10001")


def test_compose_and_prometheus_agree_with_the_server(compose, dockerfile, options):
    served, watcher = compose["services"]["mmdlm"], compose["services"]["prometheus"]
    assert (DEPLOY / served["build"]["context"] / served["build"]["dockerfile"]).is_file()
    assert served["command"] == json.loads(dict(dockerfile)["CMD"]) and named(served["command"]) <= options
    assert served["command"][-1] == f"/run/secrets/{served['secrets'][0]}"
    assert served["ports"] == [f"127.0.0.1:{PORT}:{PORT}"]
    assert int(served["stop_grace_period"].rstrip("s")) > Limits().seconds + 15
    assert set(served["secrets"] + watcher["secrets"]) == compose["secrets"].keys()
    mounted = watcher["volumes"][0].split(":")[0]
    (job,) = yaml.safe_load((DEPLOY / mounted).read_text())["scrape_configs"]
    assert job["metrics_path"] in routes()
    assert job["static_configs"] == [{"targets": [f"mmdlm:{PORT}"]}] and "mmdlm" in compose["services"]
    assert job["authorization"]["credentials_file"] == f"/run/secrets/{watcher['secrets'][0]}"


def test_kubernetes_agrees_with_the_server(kubernetes, options):
    spec = kubernetes["Deployment"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    (port,) = container["ports"]
    assert port["containerPort"] == PORT and named(container["args"]) <= options
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["port"] == port["name"]
        assert container[probe]["httpGet"]["path"] in routes()
    (keys,) = [mount for mount in container["volumeMounts"] if mount["name"] == "api-keys"]
    assert container["args"][-1] == f"{keys['mountPath']}/keys"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert pod["securityContext"]["runAsUser"] == 10001 and pod["terminationGracePeriodSeconds"] > Limits().seconds + 15
    assert container["resources"]["limits"].keys() == {"cpu", "memory"}
    service = kubernetes["Service"]["spec"]
    assert service["selector"] == spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"]
    assert service["ports"][0]["targetPort"] == port["name"]


def test_the_readme_names_what_exists(options, kubernetes, tmp_path):
    readme = (DEPLOY / "README.md").read_text()
    for path in re.findall(r"(?<![\w/.])deploy/[\w./-]+", readme):
        assert (ROOT / path).exists() or path in ("deploy/api_keys", "deploy/metrics_key"), path
    for name in re.findall(r"`(mmdlm_\w+)`", readme):
        assert f'"{name.removesuffix("_total")}"' in inspect.getsource(metrics), name
    for line in re.findall(r"mmdlm serve (--[^\n]*)", readme):
        assert named(shlex.split(line)) <= options
    secret = kubernetes["Deployment"]["spec"]["template"]["spec"]["volumes"][0]["secret"]["secretName"]
    assert f"create secret generic {secret} --from-file=keys=" in readme
    # as its commands write it
    (tmp_path / "api_keys").write_text(f"anna {'0123456789ab' * 4}\nprometheus {'f' * 48}\n")
    assert sorted(read_keys(tmp_path / "api_keys").values()) == ["anna", "prometheus"]
