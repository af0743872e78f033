"""Where a picture's bytes come from: data URLs, and addresses only where the operator allowed the host."""

from __future__ import annotations

import base64
import ipaddress
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mmdlm.errors import InputError
from mmdlm.serving.pictures import fetch, is_public, picture_bytes

MOST = 1000


def test_a_data_url_is_its_content():
    content = bytes(range(256))
    encoded = base64.b64encode(content).decode()
    for head in ("data:image/png;base64,", "data:;base64,", "DATA:image/svg+xml;charset=utf-8;BASE64,"):
        assert picture_bytes(head + encoded, most=MOST) == content
    assert picture_bytes("data:text/plain,a%20b", most=MOST) == b"a b"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("data:image/png;base64", "is no data URL"),
        ("data:image/png;base64,a", "base64 is broken"),
        ("data:image/png;base64,é", "base64 is broken"),
        ("data:" + ";" * 10_000 + ",x", "is no data URL"),
        ("", "begins with ''"),
        ("/etc/passwd", "expected a data URL"),
        ("file:///etc/passwd", "begins with 'file'"),
        ("ftp://ok.example/a.png", "begins with 'ftp'"),
        ("gopher://ok.example/", "begins with 'gopher'"),
        ("http://other.example/a.png", "fetches no pictures from 'other.example'"),
        ("http://ok.example.other.example/a.png", "fetches no pictures"),
        ("http://ok.example@other.example/", "fetches no pictures from 'other.example'"),
        ("http://user:word@ok.example/", "user name"),
        ("http://ok.example/a b", "user name or spaces"),
        ("http://ok.example/a\r\nHost: b", "user name or spaces"),
        ("http://[::1", "is no address"),
        ("http://ok.example:99999/", "is no address"),
        ("http:///a.png", "fetches no pictures from ''"),
    ],
)
def test_what_is_no_picture_is_refused_without_a_connection(url, words):
    with pytest.raises(InputError, match=words):
        picture_bytes(url, hosts=["ok.example"], most=MOST)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "255.255.255.255", "::1", "::", "fe80::1", "fc00::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254",
        "64:ff9b::7f00:1", "2002:7f00:1::", "2001:db8::1",
    ],
)  # fmt: skip
def test_private_addresses_are_not_public_however_they_are_written(address):
    assert not is_public(ipaddress.ip_address(address))


def test_public_addresses_are():
    for address in ("1.1.1.1", "2606:4700:4700::1111", "::ffff:1.1.1.1"):
        assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0"])
def test_a_host_that_is_allowed_and_resolves_to_a_private_address_is_refused(host):
    with pytest.raises(InputError, match="not public"):
        fetch(f"http://{host}:1/a.png", hosts=[host.strip("[]")], most=MOST)


@pytest.mark.parametrize("host", ["127.1", "2130706433", "0x7f000001", "017700000001", "127.0.0.1.", "LOCALHOST"])
def test_other_ways_to_write_this_machine_are_refused_even_where_they_are_allowed(host):
    with pytest.raises(InputError, match=r"not public|not found"):
        fetch(f"http://{host}:1/a.png", hosts=[host], most=MOST)


def test_a_name_server_that_changes_its_mind_gets_nowhere(monkeypatch):
    """One private address among public ones is one too many; and the address that was looked at is the one used."""
    answers = [["93.184.215.14", "127.0.0.1"], ["93.184.215.14"], ["127.0.0.1"]]
    used: list[tuple[str, int]] = []

    def resolve(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in answers.pop(0)]

    def connect(address: tuple[str, int], timeout: float) -> socket.socket:
        used.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(InputError, match="not public"):
        fetch("http://rebinding.example/a.png", hosts=["rebinding.example"], most=MOST)
    with pytest.raises(InputError, match="could not be fetched"):
        fetch("http://rebinding.example/a.png", hosts=["rebinding.example"], most=MOST)
    assert used == [("93.184.215.14", 80)] and answers == [["127.0.0.1"]]


class Answers(BaseHTTPRequestHandler):
    """A server of pictures, with all that can be wrong with one."""

    def do_GET(self) -> None:
        content = {"/good": bytes(MOST), "/large": bytes(MOST + 1), "/endless": bytes(10**6)}.get(self.path, b"")
        self.send_response({"/moved": 302, "/missing": 404}.get(self.path, 200))
        if self.path == "/moved":
            self.send_header("Location", "/good")
        self.end_headers()
        self.wfile.write(content)
        while self.path == "/drips":
            try:
                self.wfile.write(b"x")
            except OSError:
                break
            time.sleep(0.05)

    def log_message(self, *arguments: object) -> None:
        pass


def test_an_allowed_address_is_fetched_without_redirects_and_with_an_end():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        def get(path: str) -> bytes:
            url = f"http://localhost:{server.server_port}{path}"
            # this machine's own address stands for a public one
            return fetch(url, hosts=["LOCALHOST"], most=MOST, public=lambda address: True)

        assert get("/good") == bytes(MOST)
        with pytest.raises(InputError, match=r"too slow|could not be fetched"):
            url = f"http://localhost:{server.server_port}/drips"
            fetch(url, hosts=["localhost"], most=MOST, seconds=0.5, public=lambda address: True)
        for path, words in [("/large", "larger than 1000"), ("/endless", "larger"), ("/moved", "status 302"),
                            ("/missing", "status 404")]:
            with pytest.raises(InputError, match=words):
                get(path)
    finally:
        server.shutdown()
    with pytest.raises(InputError, match="could not be fetched"):
        fetch("http://localhost:1/", hosts=["localhost"], most=MOST, public=lambda address: True)
    with pytest.raises(InputError, match="is not found"):
        fetch("http://nowhere.invalid/", hosts=["nowhere.invalid"], most=MOST)
