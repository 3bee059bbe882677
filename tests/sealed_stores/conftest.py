"""What these tests share: a software token, servers on loopback, a proxy that misbehaves, and a small model."""

from __future__ import annotations

import contextlib
import os
import random
import re
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any

import numpy as np
import pytest
from attrs import define, field

from isolate import Identity, SigningKey
from isolate.crypto.secret import Secret

ACCESS, SECRET = "AKIDFORTESTSONLY", "a-key-for-tests-that-opens-nothing"
_MODULES = ("/usr/lib/softhsm/libsofthsm2.so", "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so")


@pytest.fixture(scope="session", autouse=True)
def descriptions() -> Iterator[None]:
    """boto3 reads megabytes of descriptions of services for each client: here once."""
    if find_spec("boto3") is None:
        yield
        return
    session = import_module("botocore.session")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "create_loader", cache(session.create_loader))
        yield


@pytest.fixture(scope="session")
def owner() -> SigningKey:
    return SigningKey(Secret(b"owner".ljust(32, b".")))


@pytest.fixture(scope="session")
def stranger() -> SigningKey:
    return SigningKey(Secret(b"stranger".ljust(32, b".")))


@pytest.fixture(scope="session")
def identity() -> Identity:
    return Identity(Secret(b"identity".ljust(32, b".")))


@pytest.fixture(scope="session")
def other() -> Identity:
    return Identity(Secret(b"other".ljust(32, b".")))


@define
class Token:
    """A token of SoftHSM with an AES key in it."""

    module: str
    label: str
    pin: str
    key: str


@pytest.fixture(scope="session")
def hsm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Token]:
    """A real token, made by softhsm2-util. SoftHSM reads its configuration once in a process: one for all tests."""
    pkcs11 = pytest.importorskip("pkcs11", reason="python-pkcs11 is not installed")
    module = next((path for path in _MODULES if Path(path).exists()), None)
    if module is None or which("softhsm2-util") is None:
        pytest.skip("softhsm2 is not installed: apt-get install softhsm2")
    folder = tmp_path_factory.mktemp("softhsm")
    (folder / "tokens").mkdir()
    settings = folder / "softhsm2.conf"
    settings.write_text(f"directories.tokendir = {folder}/tokens\nobjectstore.backend = file\nlog.level = ERROR\n")
    found = Token(module, "isolate tests", "4321", "kek")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTHSM2_CONF", str(settings))
        subprocess.run(
            ["softhsm2-util", "--init-token", "--free", "--label", found.label, "--so-pin", "87654321", "--pin",
             found.pin],
            check=True, capture_output=True, timeout=30,
        )  # fmt: skip
        token = pkcs11.lib(module).get_token(token_label=found.label)
        with token.open(rw=True, user_pin=found.pin) as session:
            session.generate_key(pkcs11.KeyType.AES, 256, label=found.key, store=True)
            session.generate_key(pkcs11.KeyType.AES, 256, label="another", store=True)
            session.generate_key(pkcs11.KeyType.AES, 128, label="twice", store=True)
            session.generate_key(pkcs11.KeyType.AES, 128, label="twice", store=True)
        yield found


def _free_port() -> int:
    """One that the kernel gives to nobody by itself: a server takes it a second later, and much runs meanwhile."""
    for port in random.SystemRandom().sample(range(20_000, 30_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no port is free")


def _serve(command: list[str], port: int, log: Path, **environment: str) -> subprocess.Popen[bytes]:
    """Start a server and wait until it accepts connections."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | environment)
    for _ in range(600):
        if process.poll() is not None:
            break
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return process
        time.sleep(0.05)
    process.kill()
    process.wait()
    raise RuntimeError(f"{command[0]} did not start: {log.read_text(errors='replace')[-2000:]}")


@define
class Server:
    """An HTTP server on loopback."""

    port: int
    kind: str

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@pytest.fixture(scope="session")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """moto's server: a mock of KMS and S3, which checks no signatures."""
    pytest.importorskip("moto", reason="moto is not installed")
    port = _free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = _serve(command, port, tmp_path_factory.mktemp("moto") / "log")
    yield Server(port, "moto")
    process.kill()
    process.wait()


@pytest.fixture(scope="session")
def nanio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """nanio: a real object server, with signatures, ranges and multipart uploads, over a folder of this disk."""
    pytest.importorskip("nanio", reason="nanio is not installed")
    folder, port = tmp_path_factory.mktemp("nanio"), _free_port()
    (folder / "data" / "models").mkdir(parents=True)
    command = [
        sys.executable, "-m", "nanio", "serve", "--host", "127.0.0.1", "--port", str(port), "--data-dir",
        str(folder / "data"), "--no-access-log", "--log-level", "warning",
    ]  # fmt: skip
    process = _serve(command, port, folder / "log", NANIO_ACCESS_KEY=ACCESS, NANIO_SECRET_KEY=SECRET)
    yield Server(port, "nanio")
    process.kill()
    process.wait()


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Point the environment at a server."""

    def point(url: str) -> None:
        values = {
            "AWS_ACCESS_KEY_ID": ACCESS, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT": url, "AWS_ALLOW_HTTP": "true",
            "AWS_EC2_METADATA_DISABLED": "true", "NO_PROXY": "127.0.0.1",
        }  # fmt: skip
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return point


@define
class Proxy:
    """Stands before a server and, for requests that ``chosen`` picks, breaks the answer.

    ``fault``: None, "503", "cut" (half of the answer, then the end), "slow" (nothing for ``delay`` seconds),
    "range" (an answer that names another range), "lie" (the same bytes in another order), or the bytes of an
    answer.
    ``times``: how often, None always.
    """

    server: Server
    fault: str | bytes | None = None
    times: int | None = None
    delay: float = 5.0
    chosen: Callable[[str], bool] = field(default=lambda head: head.startswith("GET") and "range:" in head.lower())
    port: int = 0
    heads: list[str] = field(factory=list)
    bodies: list[bytes] = field(factory=list)
    broken: int = 0
    lock: threading.Lock = field(factory=threading.Lock)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ranges(self) -> list[tuple[int, int]]:
        """First and last byte of every range that was asked for."""
        found = (re.search(r"(?im)^range: bytes=(\d+)-(\d+)", head) for head in self.heads)
        return [(int(match[1]), int(match[2])) for match in found if match]

    def pick(self, head: str) -> str | bytes | None:
        with self.lock:
            self.heads.append(head)
            if (
                self.fault is None
                or not self.chosen(head)
                or (self.times is not None and self.broken >= self.times)
            ):
                return None
            self.broken += 1
            return self.fault


def _message(stream: Any) -> tuple[bytes, bytes]:
    """Head and body of one HTTP/1.1 message with a length, or in chunks, which are passed on as they are."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        line = stream.readline()
        if not line:
            return b"", b""
        head += line
    length = re.search(rb"(?im)^content-length: *(\d+)", head)
    if length:
        return head, stream.read(int(length[1]))
    body = b""
    if re.search(rb"(?im)^transfer-encoding: *chunked", head):
        while True:
            line = stream.readline()
            body += line
            size = int(line.split(b";")[0] or b"0", 16)
            body += stream.read(size + 2)
            if not size:
                break
    return head, body


class _Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        proxy: Proxy = self.server.proxy  # type: ignore[attr-defined]
        while True:
            head, body = _message(self.rfile)
            if not head:
                return
            proxy.bodies.append(body)
            fault = proxy.pick(head.decode("latin-1"))
            if isinstance(fault, bytes):
                self.wfile.write(fault)
                continue
            if fault == "503":
                self.wfile.write(b"HTTP/1.1 503 Slow Down\r\ncontent-length: 0\r\n\r\n")
                continue
            if fault == "slow":
                time.sleep(proxy.delay)
            with socket.create_connection(("127.0.0.1", proxy.server.port), timeout=30) as upstream:
                upstream.sendall(
                    re.sub(rb"(?im)^connection:.*\r\n", b"", head)[:-2] + b"connection: close\r\n\r\n" + body
                )
                with upstream.makefile("rb") as answer:
                    answer_head, answer_body = _message_of(answer, head)
            answer_head = re.sub(rb"(?im)^connection:.*\r\n", b"", answer_head)
            if fault == "range":
                answer_head = re.sub(rb"(?im)^content-range: bytes (\d+)-(\d+)/", _shifted, answer_head)
            if fault == "lie":
                answer_body = answer_body[4096:] + answer_body[:4096]
            if fault == "cut":
                whole = answer_head + answer_body
                self.wfile.write(whole[: len(whole) // 2])
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            try:
                self.wfile.write(answer_head + answer_body)
            except OSError:
                return


def _shifted(match: re.Match[bytes]) -> bytes:
    return b"content-range: bytes %d-%d/" % (int(match[1]) + 4096, int(match[2]) + 4096)


def _message_of(stream: Any, request: bytes) -> tuple[bytes, bytes]:
    if not request.startswith(b"HEAD"):
        return _message(stream)
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += stream.readline()
    return head, b""


class _Threads(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is what these tests are about."""


@pytest.fixture
def proxied() -> Iterator[Callable[..., Proxy]]:
    """A proxy before a server; keyword arguments as its fields."""
    running = []

    def start(server: Server, **options: Any) -> Proxy:
        proxy = Proxy(server, **options)
        listener = _Threads(("127.0.0.1", 0), _Handler)
        listener.proxy = proxy  # type: ignore[attr-defined]
        proxy.port = listener.server_address[1]
        threading.Thread(target=listener.serve_forever, args=(0.05,), daemon=True).start()
        running.append(listener)
        return proxy

    yield start
    for listener in running:
        listener.shutdown()
        listener.server_close()


@pytest.fixture(scope="session")
def model() -> dict[str, np.ndarray[Any, Any]]:
    """24 MiB in four tensors, and a small one."""
    generator = np.random.default_rng(3)
    big = {f"layer.{i}.weight": generator.integers(0, 255, (6 << 20) + i, np.uint8) for i in range(4)}
    return {**big, "bias": np.arange(7, dtype=np.float32)}
