"""Who asks, and how much they may: bearer keys, requests a minute, requests at once."""

from __future__ import annotations

import hashlib
import hmac
import math
import time
from collections import OrderedDict
from collections.abc import Mapping

from mmdlm.serving.refusals import Refused
from mmdlm.serving.settings import Limits

REMEMBERED_CLIENTS = 4096


class Clients:
    """Names a request's client and counts what each may still ask. For one thread (the event loop's)."""

    def __init__(self, keys: Mapping[str, str], limits: Limits) -> None:
        # Hashed once: digests have one length, and no key lies in memory as it was written.
        self._keys = [(_digest(key), name) for key, name in keys.items()]
        self.have_keys, self._limits = bool(keys), limits
        self._running: dict[str, int] = {}
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client -> (requests left, at this time)

    def name(self, authorization: str | None, address: str) -> str:
        """The client of an `Authorization` header, or its address where there are no keys. `Refused` (401)."""
        if not self.have_keys:
            return address
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer":
            raise Refused(401, "No API key: send the header 'Authorization: Bearer KEY'.", code="missing_api_key",
                          kind="authentication_error")
        given, found = _digest(key.strip()), None
        for digest, name in self._keys:  # every one is compared, whichever fits: the time says nothing
            if hmac.compare_digest(digest, given):
                found = name
        if found is None:
            raise Refused(401, "Wrong API key.", code="invalid_api_key", kind="authentication_error")
        return found

    def enter(self, client: str) -> None:
        """Count a request in; every `enter` that returns needs a `leave`. `Refused` (429) where it is too many."""
        most = self._limits.requests_at_once
        if most is not None and self._running.get(client, 0) >= most:
            raise Refused(429, f"{most} requests of yours are running already, which is all you may have at once.",
                          kind="rate_limit_error", code="too_many_at_once", retry_after=1)
        self._count(client)
        self._running[client] = self._running.get(client, 0) + 1

    def leave(self, client: str) -> None:
        self._running[client] -= 1
        if not self._running[client]:
            del self._running[client]

    def _count(self, client: str) -> None:
        """A bucket of a minute's requests that fills up steadily."""
        rate, now = self._limits.requests_per_minute, time.monotonic()
        if rate is None:
            return
        left, at = self._left.pop(client, (float(rate), now))
        left = min(float(rate), left + (now - at) * rate / 60)
        self._left[client] = (max(left - 1, 0.0) if left >= 1 else left, now)
        if len(self._left) > REMEMBERED_CLIENTS:  # the one not heard of for longest, whose bucket is full by now
            self._left.popitem(last=False)
        if left < 1:
            raise Refused(429, f"You may ask {rate} times a minute.", kind="rate_limit_error",
                          code="rate_limit_exceeded", retry_after=math.ceil((1 - left) * 60 / rate))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
