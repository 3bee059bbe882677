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
from isolate.messages.http import post
from isolate.messages.owner import Done, LogRequest

Serve = Callable[[Callable[[socket.socket], None]], str]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Answers one connection with a function of the test."""
    listeners: list[socket.socket] = []

    def start(handle: Callable[[socket.socket], None]) -> str:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        listeners.append(listener)

        def run() -> None:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                got = b""
                while b"\r\n\r\n" not in got or not got.partition(b"\r\n\r\n")[2]:
                    got += connection.recv(65536)
                handle(connection)

        threading.Thread(target=run, daemon=True).start()
        return f"unix:{tmp_path / 'socket'}"

    yield start
    for listener in listeners:
        listener.close()


def response(status: int, body: bytes) -> bytes:
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (status, len(body)) + body


def ask(address: str, timeout: float = 5) -> Done:
    return post(address, "log", LogRequest(0, None), Done, timeout=timeout)


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
