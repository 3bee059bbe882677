"""One POST: its deadline is one for all of it, and whatever is at the other end, the errors are typed."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from isolate.errors import IsolateError, MalformedError, RolledBack, ServiceUnavailable, UsageError
from isolate.messages.base import MAX_MESSAGE, Refusal
from isolate.messages.http import NOT_NOW, Address, parse_address, post
from isolate.messages.owner import Done, LogRequest

Serve = Callable[..., str]
Handle = Callable[[socket.socket], None]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Answers one connection after the other, each with the next of the test's functions."""
    listeners: list[socket.socket] = []

    def start(*handles: Handle) -> str:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        listeners.append(listener)

        def run() -> None:
            for handle in handles:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection, contextlib.suppress(OSError):
                    got = b""
                    while b"\r\n\r\n" not in got or not got.partition(b"\r\n\r\n")[2]:
                        got += connection.recv(65536)
                    handle(connection)

        threading.Thread(target=run, daemon=True).start()
        return f"unix:{tmp_path / 'socket'}"

    yield start
    for listener in listeners:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # closing alone wakes no accept
        listener.close()


def response(status: int, body: bytes) -> bytes:
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (status, len(body)) + body


def ask(address: str, timeout: float = 5, **options: int) -> Done:
    return post(address, "log", LogRequest(0, None), Done, timeout=timeout, **options)


def test_an_answer_and_a_refusal(serve: Serve, tmp_path: Path) -> None:
    assert ask(serve(lambda one: one.sendall(response(200, Done(7).encode())))) == Done(7)
    (tmp_path / "socket").unlink()
    refusal = Refusal("rolled_back", "older", "", "id").encode()
    with pytest.raises(RolledBack) as refused:
        ask(serve(lambda one: one.sendall(response(403, refusal))))
    assert refused.value.request_id == "id"


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", ServiceUnavailable),
        (b"rubbish\r\n\r\n", ServiceUnavailable),
        (b"HTTP/1.1 200 X\r\nContent-Length: 9\r\n\r\nshort", MalformedError),
        (b"HTTP/1.1 200 X\r\n" + b"X: y\r\n" * 200 + b"\r\n", ServiceUnavailable),
        (response(500, b"no refusal"), ServiceUnavailable),
        (response(200, b"rubbish"), MalformedError),
        (response(200, bytes(MAX_MESSAGE + 100)), MalformedError),
    ],
)
def test_whatever_answers_the_error_is_typed(serve: Serve, answer: bytes, error: type[IsolateError]) -> None:
    with pytest.raises(error):
        ask(serve(lambda one: one.sendall(answer)))


@pytest.mark.threat("ENC-4")
@pytest.mark.parametrize("line", [b"HTTP/1.1 100 Continue\r\n\r\n", b"X"])
def test_a_dripping_courier_holds_nobody_for_longer_than_the_timeout(serve: Serve, line: bytes) -> None:
    """Bytes that keep coming reset no deadline: it is one for the whole request."""

    def drip(connection: socket.socket) -> None:
        for _ in range(200):
            connection.sendall(line)
            time.sleep(0.05)

    began = time.monotonic()
    with pytest.raises(ServiceUnavailable):
        ask(serve(drip), timeout=0.4)
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("address", ["unix:/nowhere", "unix:/" + "x" * 200, "unix:a\0b", "tcp:127.0.0.1:1"])
def test_nobody_there(address: str) -> None:
    with pytest.raises(ServiceUnavailable):
        ask(address)
    with pytest.raises(UsageError):
        ask("nowhere")


# Asking again


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Nobody waits; how long it would have been is here."""
    found: list[float] = []
    monkeypatch.setattr("isolate.messages.http.time.sleep", found.append)
    return found


def refusing(status: int, code: str, seen: list[str]) -> Handle:
    def handle(connection: socket.socket) -> None:
        seen.append(code)
        refusal = Refusal(code, "not now", "", "", "service_unavailable")
        connection.sendall(response(status, refusal.encode()))

    return handle


def done(connection: socket.socket) -> None:
    connection.sendall(response(200, Done(7).encode()))


@pytest.mark.parametrize(("status", "code"), [(429, "too_many"), (503, "busy")])
def test_what_the_service_did_not_begin_is_asked_again(
    serve: Serve, tmp_path: Path, waits: list[float], status: int, code: str
) -> None:
    assert code in NOT_NOW
    seen: list[str] = []
    refused = refusing(status, code, seen)
    assert ask(serve(refused, refused, done)) == Done(7)
    assert 0.05 <= waits[0] <= 0.1 and 0.15 <= waits[1] <= 0.3
    (tmp_path / "socket").unlink()
    with pytest.raises(ServiceUnavailable) as given_up:
        ask(serve(refused, refused, refused, done))
    assert (given_up.value.code, len(seen)) == (code, 5)


def test_nobody_there_is_asked_again(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    with pytest.raises(ServiceUnavailable):
        ask(f"unix:{tmp_path}/socket")
    assert len(waits) == 2 and sum(waits) < 0.6
    with pytest.raises(ServiceUnavailable):
        ask(f"unix:{tmp_path}/socket", attempts=1)
    assert len(waits) == 2
    # A service that is just being restarted: there at the second look.
    monkeypatch.setattr("isolate.messages.http.time.sleep", lambda _: serve(done))
    assert ask(f"unix:{tmp_path}/socket") == Done(7)


@pytest.mark.threat("SVC-33")
@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 X\r\nContent-Length: 9\r\n\r\nshort",
        response(503, b"no refusal"),
        response(503, Refusal("storage", "", "", "", "storage").encode()),
        response(500, Refusal("busy", "", "", "", "").encode()),
        response(403, Refusal("too_many", "", "", "", "").encode()),
    ],
)
def test_what_may_have_been_done_is_never_sent_again(serve: Serve, waits: list[float], answer: bytes) -> None:
    seen: list[int] = []

    def handle(connection: socket.socket) -> None:
        seen.append(1)
        connection.sendall(answer)

    with pytest.raises(IsolateError):
        ask(serve(handle, handle))
    assert (len(seen), waits) == (1, [])


@pytest.mark.threat("SVC-33")
def test_the_deadline_is_one_for_all_attempts(serve: Serve) -> None:
    began = time.monotonic()
    with pytest.raises(ServiceUnavailable):
        ask(serve(*[refusing(429, "too_many", [])] * 50), timeout=0.4, attempts=50)
    assert time.monotonic() - began < 3


# Addresses


def test_addresses() -> None:
    pin = "0123456789abcdef" * 4
    assert Address.parse(f"tls:a.example:8443#{pin}") == Address("tls", "a.example", 8443, bytes.fromhex(pin))
    assert Address.parse("tls:[::1]:8443") == Address("tls", "::1", 8443)
    assert Address.parse("unix:/a#b") == Address("unix", "/a#b")
    for odd in (
        f"tls:a:1#{pin[:-1]}", f"tls:a:1#{pin}0", f"tls:a:1#{pin.upper()}", "tls:a:1#", f"tcp:a:1#{pin}", "tls:a",
        "tls:a:65536", "tls:a:-1", "tls::1", "https:a:1", "tls", f"tls:a:1 #{pin}",
    ):  # fmt: skip
        with pytest.raises(UsageError):
            Address.parse(odd)
    # Who carries bytes, and who listens to a platform, has no use for TLS.
    with pytest.raises(UsageError):
        parse_address("tls:a:1")
