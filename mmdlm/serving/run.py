"""One server process: the socket, the model, the signals."""

from __future__ import annotations

import logging
import signal
import socket
import sys
from typing import TYPE_CHECKING

import uvicorn

from mmdlm.errors import InputError
from mmdlm.serving.connections import most_connections, patient
from mmdlm.serving.settings import Limits

if TYPE_CHECKING:  # the door brings torch along, which whoever only binds, as the driver of Ray's replicas, never needs
    from mmdlm.serving.door import Door

BACKLOG = 1024


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. InputError where the address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{host}:{port} cannot be listened at ({reason}): choose another --host or --port.") from error
    return listening


def address_of(listening: socket.socket) -> str:
    """The socket's http address."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def log_as_json() -> None:
    """All logs of the process as JSON lines on stderr."""
    from mmdlm.serving.door import JsonLines

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    for name in ("mmdlm", "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.INFO)


def run(door: Door, listening: socket.socket, limits: Limits) -> None:
    """Serve until SIGTERM or SIGINT; then take no new connection and finish what was accepted. A second SIGINT ends it.

    Longer than a request may take nothing is waited for.
    """
    config = uvicorn.Config(
        door,
        log_config=None,
        access_log=False,  # the door writes one line a request
        server_header=False,
        proxy_headers=False,  # a client could name itself as it likes
        backlog=BACKLOG,
        ws="none",
        limit_concurrency=most_connections(),
        timeout_keep_alive=max(1, int(limits.idle_seconds)),
        timeout_graceful_shutdown=int(limits.seconds) + 15,
        lifespan="on",
    )
    config.load()
    config.http_protocol_class = patient(config.http_protocol_class, limits.idle_seconds)
    # uvicorn raises the signal once more when all is done: by then it is an ordinary end.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    uvicorn.Server(config).run(sockets=[listening])
