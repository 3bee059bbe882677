"""The realm of tests/service/conftest.py, handles in it, and a house: service and enclave on real sockets."""

from __future__ import annotations

import contextlib
import importlib.util
import socketserver
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from isolate import channel
from isolate.client.agent import Agent, AgentServer
from isolate.client.handle import HandleFile
from isolate.client.owner import Owner
from isolate.crypto.signing import SigningKey
from isolate.errors import ChannelClosed, ChannelError
from isolate.messages.invoke import Invoke, Reply

_spec = importlib.util.spec_from_file_location(
    "realm_fixtures", Path(__file__).parents[1] / "service" / "conftest.py"
)
assert _spec is not None and _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)

mould, realm, realms = _module.mould, _module.realm, _module.realms

DIGEST = b"d" * 32


@pytest.fixture
def key() -> SigningKey:
    return SigningKey.generate()


@pytest.fixture
def owner(realm: Any) -> Owner:
    return Owner(realm.owner, service="unix:/service", lineage="acme")


@pytest.fixture
def file(owner: Owner, key: SigningKey) -> HandleFile:
    return owner.grant(
        "a/b", operations={"op": DIGEST, "more": DIGEST}, holder=key.verifying_key.ed25519, uses=9,
        enclave="unix:/enclave", job="acme/job", INSECURE_accept_simulated=True,
    )  # fmt: skip


class Wire:
    """A channel to an enclave that answers with a function of the test."""

    binding = b"b" * 32

    def __init__(self, answer: Any) -> None:
        self.answer, self.seen, self.closed = answer, list[Invoke](), False

    def send(self, raw: bytes) -> None:
        assert len(raw) % 1024 == 0
        self.seen.append(Invoke.parse(raw))

    def recv(self) -> bytearray:
        reply = self.answer(self.seen[-1])
        if isinstance(reply, BaseException):
            raise reply
        return bytearray(reply.padded())

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def wires(monkeypatch: pytest.MonkeyPatch) -> list[Wire]:
    """Channels that are opened; the answer of each is taken from the first of this list when it is opened."""
    opened: list[Wire] = []
    monkeypatch.setattr(channel, "connect", lambda *_, **__: opened.append(Wire(opened[0].answer)) or opened[-1])
    opened.append(Wire(lambda _: Reply("", 3, "id")))
    return opened


class House:
    """A service and an enclave on Unix sockets, in threads: for clients in other processes and event loops.

    The enclave answers with ``answer``, a function of the Invoke; it charges nothing.
    """

    def __init__(self, realm: Any, owner: Owner, folder: Path, undo: contextlib.ExitStack) -> None:
        self.realm, self.owner = realm, owner
        self.service, self.enclave = f"unix:{folder / 'service'}", f"unix:{folder / 'enclave'}"
        self.channels, self.answer = 0, self.echo
        server = socketserver.ThreadingUnixStreamServer(str(folder / "service"), self._handler())
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        undo.callback(server.server_close)
        undo.callback(server.shutdown)
        self._listener = channel.listen(
            self.enclave, identity=realm.enclave().attested(), profile="client", purpose="invoke", timeout=20
        )
        undo.callback(self._listener.close)
        threading.Thread(target=self._accept, daemon=True).start()

    @staticmethod
    def echo(request: Invoke) -> Reply:
        return Reply("", request.arguments.get("number", len(request.arguments.get("image", b""))), "id")

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        realm = self.realm

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status, message = realm.service.answer(self.path.removeprefix("/v1/"), body)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(message.encode())

            def address_string(self) -> str:
                return "unix"

            def log_message(self, *_: Any) -> None:
                pass

        return Handler

    def _accept(self) -> None:
        while True:
            try:
                opened = self._listener.accept()
            except ChannelClosed:
                return
            except ChannelError:
                continue
            self.channels += 1
            threading.Thread(target=self._serve, args=(opened,), daemon=True).start()

    def _serve(self, opened: channel.Channel) -> None:
        with contextlib.suppress(ChannelError), opened:
            while True:
                request = Invoke.parse(bytes(opened.recv()))
                opened.send(self.answer(request).padded())

    def grant(self, holder: SigningKey, **limits: Any) -> HandleFile:
        owner = Owner(self.realm.owner, service=self.service, lineage="acme")
        return owner.grant(
            "a/b", operations={"op": DIGEST}, holder=holder.verifying_key.ed25519, enclave=self.enclave,
            job="acme/job", INSECURE_accept_simulated=True, **limits,
        )  # fmt: skip


@pytest.fixture
def house(realm: Any, owner: Owner, tmp_path: Path) -> Iterator[House]:
    with contextlib.ExitStack() as undo:
        yield House(realm, owner, tmp_path, undo)


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Callable[..., AgentServer]]:
    """Starts an agent with this key, in a thread."""
    with contextlib.ExitStack() as undo:

        def start(key: SigningKey, name: str = "agent", **options: Any) -> AgentServer:
            server = AgentServer(Agent(key, **options), f"unix:{tmp_path / name}")
            threading.Thread(target=server.run, daemon=True).start()
            undo.callback(server.close)
            return server

        yield start
