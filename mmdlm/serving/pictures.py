"""A picture's bytes from what a request gives: a data URL, or an address where the operator allowed its host."""

from __future__ import annotations

import base64
import binascii
import contextlib
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection
from urllib.parse import unquote_to_bytes, urlsplit

from mmdlm.errors import InputError

_DATA_URL = re.compile(r"data:(?P<type>[\w.+/-]*)(?P<rest>(;[^,;]*)*?)(?P<base64>;base64)?,", re.ASCII | re.IGNORECASE)
FETCH_SECONDS = 10.0

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def picture_bytes(url: str, *, hosts: Collection[str] = (), most: int) -> bytes:
    """The bytes of a `data:` URL's picture, or of one at an http(s) address whose host is in `hosts`; `most` of them.

    What the URL says about the type is not believed: the content is looked at later. Raises InputError.
    """
    if url[:5].lower() == "data:":
        found = _DATA_URL.match(url[:256])
        if found is None:
            raise InputError("image_url is no data URL, expected data:image/png;base64,...: encode the file in base64.")
        try:
            content = url[found.end() :]
            return base64.b64decode(content, validate=True) if found["base64"] else unquote_to_bytes(content)
        except (binascii.Error, ValueError) as error:
            raise InputError(f"The data URL's base64 is broken ({error}): encode the file again.") from error
    scheme = url.partition(":")[0][:16]
    if scheme.lower() not in ("http", "https"):
        raise InputError(f"image_url begins with {scheme!r}, expected a data URL: data:image/png;base64,...")
    return fetch(url, hosts=hosts, most=most)


def is_public(address: Address) -> bool:
    """Is it an address of the open internet, behind whatever notation of IPv6?"""
    if isinstance(address, ipaddress.IPv6Address):
        # what IPv6 can wrap around an IPv4 address: ::ffff:a.b.c.d, 6to4, Teredo, NAT64's 64:ff9b::/96
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        nat64 = address in ipaddress.ip_network("64:ff9b::/96")
        if address.sixtofour is not None or address.teredo is not None or nat64:
            return False
    return address.is_global and not address.is_multicast


def fetch(
    url: str, *, hosts: Collection[str], most: int, seconds: float = FETCH_SECONDS,
    public: Callable[[Address], bool] = is_public,
) -> bytes:
    """GET `url` if its host is in `hosts` and all its addresses are `public`; no redirects, at most `most` bytes.

    The name is resolved once and the connection goes to the address that was checked: a name server that answers
    differently the second time changes nothing. Raises InputError.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or (443 if parts.scheme.lower() == "https" else 80)
    except ValueError as error:
        raise InputError(f"image_url is no address ({error}): send the picture as a data URL.") from error
    if host not in {allowed.lower() for allowed in hosts}:
        raise InputError(
            f"This server fetches no pictures from {host[:80]!r}: send the picture as a data URL, "
            "data:image/png;base64,..."
        )
    if parts.username is not None or any(ord(letter) <= 32 or ord(letter) == 127 for letter in url):
        raise InputError("image_url has a user name or spaces in it: give a plain address, or a data URL.")
    until = time.monotonic() + seconds
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
        addresses = [ipaddress.ip_address(str(text).split("%")[0]) for text in found]
    except (OSError, ValueError) as error:
        raise InputError(f"The host {host!r} is not found: send the picture as a data URL.") from error
    if not addresses or not all(map(public, addresses)):
        raise InputError(f"The host {host!r} has an address that is not public: send the picture as a data URL.")
    try:
        return _get(parts.scheme.lower(), host, str(addresses[0]), port, _target(url), most, until)
    except (OSError, http.client.HTTPException) as error:
        raise InputError(f"The picture at {host!r} could not be fetched ({type(error).__name__}): "
                         "send it as a data URL.") from error


def _target(url: str) -> str:
    parts = urlsplit(url)
    return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def _get(scheme: str, host: str, address: str, port: int, target: str, most: int, until: float) -> bytes:
    raw = socket.create_connection((address, port), timeout=max(0.1, until - time.monotonic()))
    connection = http.client.HTTPConnection(host, port)
    connection.sock = raw
    # A socket's own timeout is one for each read: a byte now and then would hold this thread for hours.
    end = threading.Timer(max(0.1, until - time.monotonic()), _hang_up, [raw])
    end.start()
    try:
        if scheme == "https":
            connection.sock = ssl.create_default_context().wrap_socket(raw, server_hostname=host)
        connection.request("GET", target, headers={"Accept": "image/*", "User-Agent": "mmdlm"})
        answer = connection.getresponse()
        if answer.status != 200:  # a redirect is an answer like any other: it is not followed
            raise InputError(f"{host!r} answered with status {answer.status}, expected 200 and a picture.")
        content = b""
        while chunk := answer.read1(65536):
            content += chunk
            if len(content) > most:
                raise InputError(f"The picture at {host!r} is larger than {most} bytes: send a smaller one.")
        if time.monotonic() >= until:  # what came is not all
            raise InputError(f"{host!r} was too slow: send the picture as a data URL.")
        return content
    finally:
        end.cancel()
        connection.close()
        raw.close()


def _hang_up(raw: socket.socket) -> None:
    with contextlib.suppress(OSError):  # closed already
        raw.shutdown(socket.SHUT_RDWR)
