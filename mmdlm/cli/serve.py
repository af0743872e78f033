"""`mmdlm serve`: the model behind HTTP."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from mmdlm.cli.loading import DeviceOption, ModelOption, QuantizeOption, load_pipeline
from mmdlm.errors import InputError

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
    largest_body: Annotated[float, typer.Option("--largest-body", min=0.001, help="Of a request, in MiB.")] = 20.0,
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
        requests_per_minute=per_minute,
        requests_at_once=at_once,
    )
    from mmdlm.serving.run import address_of, bind, log_as_json, run

    listening = bind(host, port)  # before the model: a port in use is said at once
    pipe = load_pipeline("TextToImage", model, device, True, quantize)

    from mmdlm.model_directory import model_hash
    from mmdlm.serving.server import Service, create_app

    directory = Path(pipe.name_or_path)
    service = Service(
        pipe,
        name=name or directory.resolve().name,
        model_hash=model_hash(directory),
        limits=limits,
        url_hosts=allow_url_host or (),
    )
    log_as_json()
    typer.echo(address_of(listening))
    run(create_app(service, keys=keys, local=local), listening, limits)
