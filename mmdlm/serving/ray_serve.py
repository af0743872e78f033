"""The same application as a Ray Serve deployment: replicas on one machine or on many, more of them under load.

Every replica is a process with the model, the engine and the door of `mmdlm serve`. So what a replica counts is its
own: a client's limits, /metrics and the queue are those of one replica, and Ray decides which one a request meets.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from mmdlm.errors import InputError

NAME = "mmdlm"
HEALTH_SECONDS = 120.0  # a machine that is busy answers late, and a replica that is restarted loses its requests
START_SECONDS = 1200.0  # until the deployment takes requests
# What a Ray that is started here is told: to report to nobody, to give its processes the priority of the one that
# starts it (by itself it lets everything else on the machine go first), and to wait longer than seconds for those that
# start or answer slowly on a busy machine (it would kill and start them again, which makes it no less busy).
PATIENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "300",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "120",
}
TARGET_REQUESTS = 16  # of a replica before another is started: fewer would not fill its shared forwards


class Replica:
    """The ASGI application, made where it runs: a model and its engine's thread cannot be sent to another process."""

    def __init__(self, build: Callable[[], Any]) -> None:
        self.build, self.door = build, None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self.door is None:  # the first call is the lifespan's, before any request
            from mmdlm.serving.run import log_as_json

            log_as_json()  # to this process's file among Ray's logs
            self.door = self.build()
        await self.door(scope, receive, send)  # type: ignore[misc]


def connect() -> bool:
    """Join the Ray cluster of $RAY_ADDRESS, or start one on this machine. True where it was started here.

    Raises InputError where Ray is not installed or its cluster cannot be reached.
    """
    if find_spec("ray") is None:
        raise InputError("--ray needs Ray, which is not installed: pip install 'mmdlm[ray]'.")
    for name, value in PATIENT.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        return False
    address = os.environ.get("RAY_ADDRESS")
    try:
        own: dict[str, Any] = {} if address else {"include_dashboard": False}
        ray.init(address or "local", log_to_driver=False, logging_level="warning", **own)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0][:160].rstrip(".")
        where = address or "this machine"
        raise InputError(f"The Ray cluster at {where} cannot be joined ({reason}): see RAY_ADDRESS.") from error
    return not address


def deploy(
    build: Callable[[], Any],
    *,
    host: str,
    port: int,
    replicas: int = 1,
    max_replicas: int | None = None,
    seconds: float = 120.0,
    at_once: int = 256,
    gpu: bool = False,
) -> None:
    """Run `build()`, an ASGI application, as the deployment "mmdlm" at host:port, and return when it takes requests.

    `build` is called in every replica, and has to be picklable. With `max_replicas` there are between `replicas` and so
    many, by load. `seconds`: what a request may take, for draining. `at_once`: requests of one replica.
    Raises InputError for counts that contradict each other and where no replica starts.
    """
    if replicas < 1 or (max_replicas is not None and max_replicas < replicas):
        raise InputError(f"Got {replicas} replicas and at most {max_replicas}, expected 1 or more, and not fewer.")
    connect()
    from ray import serve
    from ray.exceptions import RayError

    several: dict[str, Any] = {"num_replicas": replicas}
    if max_replicas is not None and max_replicas > replicas:
        scaling = {"min_replicas": replicas, "max_replicas": max_replicas, "target_ongoing_requests": TARGET_REQUESTS}
        several = {"autoscaling_config": scaling}
    resources = {"num_cpus": 1, **({"num_gpus": 1} if gpu else {})}
    deployment = serve.deployment(
        name=NAME,
        max_ongoing_requests=at_once,
        graceful_shutdown_timeout_s=seconds + 15,
        health_check_timeout_s=HEALTH_SECONDS,
        ray_actor_options=resources,
        **several,
    )(serve.ingress(Replica(build))())
    until = time.monotonic() + START_SECONDS
    while True:
        try:
            serve.start(http_options={"host": host, "port": port})
            serve.run(deployment.bind(), name=NAME, route_prefix="/", blocking=False)
            return
        # Ray gives its proxy a minute, which cannot be changed; asked again it waits for the same proxy once more.
        except (TimeoutError, RayError, RuntimeError) as error:
            if isinstance(error, RuntimeError) or time.monotonic() > until:
                reason = str(error).strip().splitlines()[0][:200].rstrip(".")
                raise InputError(f"Ray could not start the replicas ({reason}): see its logs.") from error


def until_stopped(started_here: bool) -> None:
    """Wait for SIGTERM or SIGINT; then let the replicas finish what they accepted, and take the deployment down."""
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    while not stopped.wait(1.0):  # in slices, so that signals are seen
        pass
    import ray
    from ray import serve

    if started_here:
        serve.shutdown()
    else:
        serve.delete(NAME)
    ray.shutdown()
