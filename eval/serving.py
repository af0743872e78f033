"""How much a server answers: a load test of `mmdlm serve` on this machine, against serving one request at a time.

    mmdlm run eval/serving                                  # 1, 4, 16 and 64 clients, the shipped model
    mmdlm run eval/serving clients=[16] minutes=10          # afterwards ten minutes of 16 clients: is memory flat?
    mmdlm run eval/serving requests=32 clients=[1,16] out=runs/short

It starts a server process on a free port of the loopback, as a person does, and asks it for pictures and captions by
turns. Every level of clients sends the same requests, each client its next one as soon as it has its answer; one client
is one-at-a-time serving, and its answers are what all others' are compared with. Equal is the same words with the same
confidence within 0.001, or the same picture within 1 of 255 levels; pictures are asked for at temperature 0. The files
of captions are other bytes at every level, so that no level finds its pictures' codes kept by the level before.

Writes to `out`: run.json with every latency, results.md, serving.png, and the server's log.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from mmdlm.assets import shipped_model
from mmdlm.errors import InputError
from mmdlm.evaluation.runs import write_run
from mmdlm.model_directory import check_model_directory, model_hash
from mmdlm.picture_files import write_whole
from mmdlm.training.arguments import config_from_arguments, run_program

THINGS = ("red apple", "cat", "dog", "blue car", "banana", "tree", "yellow star", "house", "fish", "key", "rose")
SAME_CONFIDENCE = 1e-3  # float32 sums in another order
SAME_LEVEL = 1  # of 255: likewise, a pixel that stands at a half may be rounded up or down
SAMPLE_SECONDS = 0.5
Body = dict[str, Any]


@dataclass
class Config:
    """What to ask, and of what."""

    model: str | None = None  # None: the shipped one
    out: str = "runs/serving"
    clients: list[int] = field(default_factory=lambda: [1, 4, 16, 64])
    requests: int = 96  # of a level; every second one is a caption
    minutes: float = 0.0  # of `soak_clients` afterwards, to see the memory
    soak_clients: int = 16
    temperature: float | None = 0.0  # of pictures; None: the preset's. Above 0 rounding may turn a draw
    options: str = ""  # more options of `mmdlm serve`
    seed: int = 0


def main(arguments: list[str]) -> None:
    config = config_from_arguments(Config, arguments, program=__file__)
    levels = sorted(set(config.clients))
    if not levels or levels[0] < 1 or levels[-1] > 512 or config.requests < 2 or config.minutes < 0:
        raise InputError(
            f"clients are {config.clients}, requests {config.requests}, minutes {config.minutes}: expected 1 to 512 "
            "clients, 2 requests or more and 0 minutes or more."
        )
    model = Path(config.model) if config.model is not None else shipped_model()
    check_model_directory(model)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    started, command = time.perf_counter(), ["mmdlm", "run", "eval/serving", *arguments]
    with server(model, out / "server.log", config.options) as (process, address), Memory(process.pid) as memory:
        load(address, asked(config, "warm")[:4], 2)  # the first forwards allocate
        alone = level(address, asked(config, 1), 1)
        found: dict[str, Any] = {"levels": [compared(alone, alone)]}
        for clients in (clients for clients in levels if clients > 1):
            found["levels"].append(compared(level(address, asked(config, clients), clients), alone))
            print(f"{clients} clients: {found['levels'][-1]['per_second']:.2f} requests/s", file=sys.stderr, flush=True)
        if config.minutes:
            found["soak"] = soak(address, config, memory)
    found["memory"], found["load_average_after"] = memory.samples, round(os.getloadavg()[0], 2)
    found["server_errors"] = sum('"level": "error"' in line for line in (out / "server.log").open(encoding="utf-8"))
    about = {"directory": model.name, "hash": model_hash(model)}
    write_run(out, kind="serving", command=command, seed=config.seed, settings={**asdict(config), "device": "cpu"},
              results=found, model=about, seconds=time.perf_counter() - started)  # fmt: skip
    report = table(found, shlex.join(command))
    write_whole(out / "results.md", report.encode())
    plot(found, out / "serving.png")
    print(report)


# ---------------------------------------------------------------------------------------------------- what is asked


def asked(config: Config, mark: object) -> list[tuple[str, Body]]:
    """(path, body) of every request, pictures and captions by turns. `mark` is in the files and changes no pixel."""
    requests: list[tuple[str, Body]] = []
    for i in range(config.requests):
        if i % 2 == 0:
            prompt = f"a {THINGS[i // 2 % len(THINGS)]}"
            body: Body = {"prompt": prompt, "seed": config.seed + i}
            if config.temperature is not None:
                body["temperature"] = config.temperature
            requests.append(("/v1/images/generations", body))
        else:
            url = "data:image/png;base64," + base64.b64encode(drawing(config.seed + i, mark)).decode()
            requests.append(("/v1/caption", {"image_url": url, "seed": config.seed + i}))
    return requests


def drawing(seed: int, mark: object, side: int = 64) -> bytes:
    """A PNG of a few coloured shapes, another one for every seed."""
    random, picture = np.random.default_rng(seed), Image.new("RGB", (side, side), "white")
    brush = ImageDraw.Draw(picture)
    for _ in range(4):
        left, top, width, height, *colour = random.integers(4, 252, 7).tolist()
        box = (left % side, top % side, left % side + 4 + width % 32, top % side + 4 + height % 32)
        (brush.ellipse if width % 2 else brush.rectangle)(box, fill=tuple(colour))
    facts = PngInfo()
    facts.add_text("mark", str(mark))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=facts)
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------- the server


@contextmanager
def server(model: Path, log: Path, options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server process, and its address; asked to end, and waited for, at the end."""
    command = [sys.executable, "-c", "from mmdlm.cli import main; main()", "serve", "--port", "0", "--device", "cpu"]
    command += ["--model", str(model), *shlex.split(options)]
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        if not address:
            raise InputError(f"The server did not start ({log.read_text(encoding='utf-8').strip()[-300:]}).")
        yield process, address
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


class Memory:
    """Resident megabytes of a process over time, as [seconds, MB]; nothing where /proc is not there."""

    def __init__(self, pid: int) -> None:
        self.samples: list[tuple[float, float]] = []
        self._status, self._end, self._started = Path(f"/proc/{pid}/status"), threading.Event(), time.monotonic()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.is_set():
            try:
                resident = re.search(r"VmRSS:\s+(\d+) kB", self._status.read_text())
            except OSError:
                return
            if resident:
                passed = round(time.monotonic() - self._started, 2)
                self.samples.append((passed, round(int(resident[1]) / 1024, 1)))
            self._end.wait(SAMPLE_SECONDS)


class Client:
    """One connection that is kept. `ask` gives (status, answer, seconds); of a stream or an error nothing is hidden."""

    def __init__(self, address: str) -> None:
        host = urlsplit(address)
        self._connection = http.client.HTTPConnection(host.hostname or "", host.port, timeout=600)

    def ask(self, path: str, body: Body | None = None) -> tuple[int, bytes, float]:
        started = time.perf_counter()
        content = None if body is None else json.dumps(body).encode()
        headers = {} if body is None else {"Content-Type": "application/json"}
        self._connection.request("GET" if body is None else "POST", path, content, headers)
        answer = self._connection.getresponse()
        return answer.status, answer.read(), time.perf_counter() - started

    def close(self) -> None:
        self._connection.close()


# ---------------------------------------------------------------------------------------------------- the load


def load(
    address: str, requests: Sequence[tuple[str, Body]], clients: int, until: float | None = None
) -> tuple[list[tuple[int, int, bytes, float]], float]:
    """Every request once, or over and over `until` time.monotonic(): ((number, status, answer, seconds) ..., wall)."""
    taken, answers, failed = iter(range(len(requests) if until is None else 10**9)), [], list[BaseException]()
    lock = threading.Lock()

    def one() -> None:
        client = Client(address)
        try:
            while True:
                with lock:
                    number = next(taken, None)
                if number is None:
                    return
                path, body = requests[number % len(requests)]
                answer = client.ask(path, body if until is None else {**body, "seed": number})
                with lock:
                    # what a picture was is not kept for minutes
                    answers.append((number, *(answer if until is None else (answer[0], b"", answer[2]))))
                if until is not None and time.monotonic() > until:
                    return
        except BaseException as error:
            failed.append(error)
        finally:
            client.close()

    threads = [threading.Thread(target=one) for _ in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return sorted(answers), time.perf_counter() - started


def level(address: str, requests: Sequence[tuple[str, Body]], clients: int) -> dict[str, Any]:
    """What `clients` at once are given for these requests."""
    before = counters(address)
    answers, seconds = load(address, requests, clients)
    after = counters(address)
    forwards = after["mmdlm_forwards_total"] - before["mmdlm_forwards_total"]
    rows = after["mmdlm_batch_rows_sum"] - before["mmdlm_batch_rows_sum"]
    latencies = {"picture": [a[3] for a in answers if a[0] % 2 == 0], "caption": [a[3] for a in answers if a[0] % 2]}
    return {
        "clients": clients,
        "seconds": seconds,
        "per_second": len(answers) / seconds,
        "failed": sum(answer[1] != 200 for answer in answers),
        "latency": {kind: percentiles(values) for kind, values in latencies.items()},
        "latency_all": percentiles([answer[3] for answer in answers]),
        "rows_per_step": rows / max(forwards, 1),
        "seconds_of_requests": [round(answer[3], 4) for answer in answers],
        "answers": [meaning(answer[2]) for answer in answers],
    }


def compared(one: dict[str, Any], alone: dict[str, Any]) -> dict[str, Any]:
    """A level with what it is to one-at-a-time serving: times its throughput, and how many answers are equal."""
    pairs = list(zip(one["answers"], alone["answers"], strict=True))
    kept = {key: value for key, value in one.items() if key != "answers"}
    others = [n for n, (a, b) in enumerate(pairs) if not same(a, b)]
    counts = {"equal": len(pairs) - len(others), "asked": len(pairs), "unequal": others}
    counts["same_content"] = sum(a[0] == b[0] for a, b in pairs)  # words, or the picture's file to the byte
    return {**kept, "times": one["per_second"] / alone["per_second"], **counts}


def meaning(content: bytes) -> tuple[str, float]:
    """An answer's text and confidence, or its picture's file in base64."""
    data = json.loads(content).get("data", [{}])
    if "captions" in data[0]:
        return data[0]["captions"][0]["text"], data[0]["captions"][0]["confidence"]
    return data[0].get("b64_json", content.decode(errors="replace")), 0.0


def same(one: tuple[str, float], other: tuple[str, float]) -> bool:
    """Whether two answers are the same words or the same picture, but for the order of float32 sums."""
    if one[0] != other[0]:
        try:
            a, b = (np.asarray(Image.open(io.BytesIO(base64.b64decode(each[0])))).astype(int) for each in (one, other))
        except (ValueError, OSError):
            return False  # words
        return a.shape == b.shape and int(abs(a - b).max()) <= SAME_LEVEL
    return abs(one[1] - other[1]) <= SAME_CONFIDENCE


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    return {f"p{share}": float(np.percentile(seconds, share)) for share in (50, 95, 99)} if seconds else {}


def counters(address: str) -> dict[str, float]:
    """The server's own numbers, those without labels."""
    client = Client(address)
    try:
        lines = client.ask("/metrics")[1].decode().splitlines()
    finally:
        client.close()
    return {name: float(value) for name, value in re.findall(r"^(\w+) (\S+)$", "\n".join(lines), re.MULTILINE)}


def soak(address: str, config: Config, memory: Memory) -> dict[str, Any]:
    """Minutes of load, and the memory's median in each fifth of them: flat is no growth from the second on."""
    first = len(memory.samples)
    answers, seconds = load(address, asked(config, "soak"), config.soak_clients, time.monotonic() + config.minutes * 60)
    resident = [sample[1] for sample in memory.samples[first:]]
    fifths = [round(float(np.median(part)), 1) for part in np.array_split(resident, 5) if len(part)]
    return {
        "minutes": config.minutes,
        "clients": config.soak_clients,
        "answered": len(answers),
        "failed": sum(answer[1] != 200 for answer in answers),
        "per_second": len(answers) / seconds,
        "latency_all": percentiles([answer[3] for answer in answers]),
        "megabytes_by_fifths": fifths,
    }


# ---------------------------------------------------------------------------------------------------- the report


def table(found: dict[str, Any], command: str) -> str:
    lines = ["| clients | requests/s | times one at a time | p50, s | p95, s | p99, s | rows a step | equal to alone | "
             "failed |", "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for one in found["levels"]:
        late = " | ".join(f"{one['latency_all'][share]:.2f}" for share in ("p50", "p95", "p99"))
        lines.append(f"| {one['clients']} | {one['per_second']:.2f} | {one['times']:.2f} | {late} | "
                     f"{one['rows_per_step']:.1f} | {one['equal']} of {one['asked']} | {one['failed']} |")  # fmt: skip
    if found["memory"]:
        resident = [sample[1] for sample in found["memory"]]
        lines += ["", f"Resident memory of the server: {resident[0]:.0f} MB at first, {max(resident):.0f} MB at most."]
    if "soak" in found:
        long = found["soak"]
        fifths = ", ".join(f"{value:.0f}" for value in long["megabytes_by_fifths"])
        lines += ["", f"{long['minutes']:g} minutes of {long['clients']} clients: {long['answered']} answers, "
                  f"{long['failed']} failed, {long['per_second']:.2f} requests/s; megabytes in its fifths: {fifths}."]
    lines += ["", f"Errors in the server's log: {found['server_errors']}. Load average of the machine afterwards "
              f"{found['load_average_after']}. Command: `{command}`."]
    return "\n".join(lines) + "\n"


def plot(found: dict[str, Any], path: Path) -> None:
    """Throughput and latency by clients, and memory by time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3), layout="constrained")
    FigureCanvasAgg(figure)
    speed, late, memory = figure.subplots(1, 3)
    clients = [one["clients"] for one in found["levels"]]
    speed.plot(clients, [one["per_second"] for one in found["levels"]], "o-", color="#2563c9")
    speed.set(xlabel="clients", ylabel="requests a second", ylim=(0, None))
    for share, colour in (("p50", "#2563c9"), ("p95", "#c98a25"), ("p99", "#c92525")):
        late.plot(clients, [one["latency_all"][share] for one in found["levels"]], "o-", color=colour, label=share)
    late.set(xlabel="clients", ylabel="seconds", ylim=(0, None))
    late.legend()
    if found["memory"]:
        memory.plot(*zip(*found["memory"], strict=True), color="#2563c9")
    memory.set(xlabel="seconds", ylabel="resident MB of the server", ylim=(0, None))
    with tempfile.NamedTemporaryFile(suffix=".png", dir=path.parent, delete=False) as whole:
        figure.savefig(whole, dpi=120, format="png")
    os.replace(whole.name, path)


if __name__ == "__main__":
    run_program(main)
