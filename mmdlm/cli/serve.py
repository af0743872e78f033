"""`mmdlm serve`: the model behind HTTP."""

from __future__ import annotations

import hashlib
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmdlm.cli.loading import DeviceOption, ModelOption, QuantizeOption, load_pipeline
from mmdlm.errors import InputError

if TYPE_CHECKING:
    from mmdlm.serving.door import Door
    from mmdlm.serving.settings import Limits

NEEDED = ("fastapi", "uvicorn", "prometheus_client", "python_multipart")


def serve(
    model: ModelOption = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen at; only this machine reaches 127.0.0.1.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option("--name", help="The model's name in requests; its directory's if not given.")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", help="DIR: what finetune wrote is the model; NAME=DIR: one beside it, repeatable."),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", help="One key a line, KEY or NAME KEY; needed off this machine.")
    ] = None,
    allow_anyone: Annotated[
        bool, typer.Option("--allow-anyone", help="Listen off this machine without keys.")
    ] = False,
    allow_url_host: Annotated[
        list[str] | None, typer.Option("--allow-url-host", help="Fetch pictures from this host; may be repeated.")
    ] = None,
    per_minute: Annotated[int | None, typer.Option("--per-minute", min=1, help="Requests of a client.")] = None,
    at_once: Annotated[int | None, typer.Option("--at-once", min=1, help="Requests of a client.")] = None,
    budget: Annotated[int, typer.Option("--budget", min=1, help="Tokens of a forward; bounds the memory.")] = 16384,
    queue: Annotated[int, typer.Option("--queue", min=1, help="Results that may wait for room.")] = 256,
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds a request may take.")] = 120.0,
    idle: Annotated[
        float, typer.Option("--idle", min=0.1, help="Seconds for a request's head, or without a byte either way.")
    ] = 30.0,
    largest_body: Annotated[float, typer.Option("--largest-body", min=0.001, help="Of a request, in MiB.")] = 20.0,
    ray: Annotated[bool, typer.Option("--ray", help="As a Ray Serve deployment, on $RAY_ADDRESS or this machine.")] = (
        False
    ),
    replicas: Annotated[int, typer.Option("--replicas", min=1, help="Of --ray: processes with the model.")] = 1,
    max_replicas: Annotated[
        int | None, typer.Option("--max-replicas", min=1, help="Of --ray: up to so many, by load.")
    ] = None,
    device: DeviceOption = None,
    quantize: QuantizeOption = None,
) -> None:
    """Serve the model over HTTP: /v1/caption, OpenAI's chat and pictures, a page at /. Ctrl-C ends it."""
    missing = [package for package in NEEDED if find_spec(package) is None]
    if missing:
        raise InputError(f"mmdlm serve needs {missing[0]}, which is not installed: pip install 'mmdlm[serve]'.")
    from mmdlm.serving.settings import Limits, is_loopback, read_keys

    keys = {} if api_key_file is None else read_keys(api_key_file)
    local = is_loopback(host)
    if not (local or keys or allow_anyone):
        raise InputError(
            f"At {host} others could use the model, expected keys: give --api-key-file, or --allow-anyone for none."
        )
    limits = Limits(
        body_bytes=int(largest_body * 2**20),
        budget=budget,
        queue=queue,
        seconds=timeout,
        idle_seconds=idle,
        requests_per_minute=per_minute,
        requests_at_once=at_once,
    )
    # absolute: Ray's replicas run in directories of their own
    places = [None if path is None else path.resolve() for path in (model, api_key_file)]
    hosts = tuple(allow_url_host or ())
    merged, adapters = _adapters(adapter or [])
    if merged is not None and quantize is not None:
        raise InputError(f"--quantize {quantize} and --adapter {merged} were given, expected one: `mmdlm merge` it.")
    build = partial(application, places[0], device, quantize, name, limits, places[1], hosts, local, adapters, merged)
    from mmdlm.serving.run import BACKLOG, address_of, bind, log_as_json, run

    listening = bind(host, port)  # before the model: a port in use is said at once
    address = address_of(listening)
    if ray:
        from mmdlm.assets import shipped_model
        from mmdlm.model_directory import check_model_directory
        from mmdlm.serving.ray_serve import connect, deploy, until_stopped

        port = listening.getsockname()[1]
        listening.close()  # Ray's proxy listens there itself
        check_model_directory(places[0] or shipped_model())
        started_here = connect()
        gpu = device is not None and device.startswith("cuda")
        deploy(build, host=host, port=port, replicas=replicas, max_replicas=max_replicas, seconds=timeout,
               at_once=queue, gpu=gpu)
        typer.echo(address)
        until_stopped(started_here)
        return
    door = build()
    log_as_json()
    listening.listen(BACKLOG)  # who reads the address and comes at once waits, and is not refused
    typer.echo(address)
    run(door, listening, limits)


def application(
    model: Path | None,
    device: str | None,
    quantize: str | None,
    name: str | None,
    limits: Limits,
    api_key_file: Path | None,
    url_hosts: tuple[str, ...],
    local: bool,
    adapters: dict[str, Path],
    merged: Path | None = None,
) -> Door:
    """The model with everything around it: what one server process runs, or one replica of Ray's.

    merged: an adapter that becomes part of the model. The keys are read where they are needed, and are in no message
    between processes.
    """
    pipe = load_pipeline("TextToImage", model, device, True, quantize, adapter=merged)

    from mmdlm.model_directory import model_hash
    from mmdlm.serving.server import Service, create_app
    from mmdlm.serving.settings import read_keys

    directory, hashes = Path(pipe.name_or_path), {}
    known_as, identity = directory.resolve().name, model_hash(directory)
    if merged is not None:
        from mmdlm.models.adapters import adapter_facts, merge_adapter

        known_as, identity = merged.name, f"{identity}+{adapter_facts(pipe.model)['adapter_hash']}"
        merge_adapter(pipe.model)
        pipe.model.requires_grad_(False)
    if adapters:
        from mmdlm.models.adapters import WEIGHTS, adapter_directory, load_adapter, read_adapter

        for label, place in adapters.items():
            if read_adapter(adapter_directory(place)).get("new_words"):  # its ids are not the others'
                raise InputError(
                    f"The adapter {label} has words of its own, expected the model's: serve it by itself, with "
                    f"--adapter {place}."
                )
            load_adapter(pipe.model, place, name=label, base=identity)
            hashes[label] = hashlib.sha256((adapter_directory(place) / WEIGHTS).read_bytes()).hexdigest()[:16]
    service = Service(
        pipe,
        name=name or known_as,
        model_hash=identity,
        limits=limits,
        url_hosts=url_hosts,
        adapters=hashes,
    )
    return create_app(service, keys={} if api_key_file is None else read_keys(api_key_file), local=local)


def _adapters(given: list[str]) -> tuple[Path | None, dict[str, Path]]:
    """The --adapter that becomes the model, and those that are served beside it by their names."""
    if len(given) == 1 and "=" not in given[0]:
        return Path(given[0]).resolve(), {}
    named = {}
    for text in given:
        name, _, place = text.partition("=")
        if not (name and place):
            raise InputError(
                f"--adapter got {text!r}, expected NAME=DIR, for example stickers=runs/stickers, or one DIR alone."
            )
        if name in named:
            raise InputError("--adapter names two adapters alike, expected a name of its own for each: rename one.")
        named[name] = Path(place).resolve()
    return None, named
