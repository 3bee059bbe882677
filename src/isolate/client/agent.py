"""The signing agent: a process that holds a holder's key and signs with it, for programs of its own user only.

    >>> from isolate.crypto.signing import Purpose, SigningKey
    >>> agent = Agent(SigningKey.generate())
    >>> AgentAnswer.parse(agent.answer(AgentRequest(Purpose.INVOCATION, b"body").encode())).code
    ''
    >>> AgentAnswer.parse(agent.answer(AgentRequest(Purpose.GRANT, b"body").encode())).code
    'agent_refused'

A notebook that uses an agent has no key in its memory. While it can reach the agent it can do what the holder can:
invoke, ask for budgets, and pass handles on (unless the agent was told not to). The socket's file is the user's
alone, and the kernel says who connects: another user is hung up on. docs/handles.md has the protocol.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Collection
from typing import Final

from attrs import field, frozen

from isolate.channel.streams import bound_socket, close_listening
from isolate.crypto.signing import Purpose, Signer
from isolate.errors import MalformedError, StorageError, UsageError
from isolate.messages.base import Message

# What a holder signs, and nothing that an owner, a service or an enclave does.
PURPOSES: Final = frozenset({Purpose.BLOCK, Purpose.INVOCATION, Purpose.HOLDER_REQUEST, Purpose.CHANNEL_HOLDER})
MAX_SIGNED = 64 * 1024  # bytes of a message to sign: a request with a whole token in it takes 5 KiB
MAX_FRAME = MAX_SIGNED + 1024
MAX_CLIENTS = 64  # at once
_LENGTH = struct.Struct(">I")


@frozen
class AgentRequest(Message):
    """``purpose`` is the value of a Purpose; an empty one asks for the key alone."""

    TYPE = "agent-request"
    purpose: str
    message: bytes = field(repr=False)


@frozen
class AgentAnswer(Message):
    """``key`` is a verifying key (64 bytes); ``code`` is empty for a signature (64 bytes), or says why not."""

    TYPE = "agent-answer"
    key: bytes
    signature: bytes = field(repr=False)
    code: str


class Agent:
    """The core, without I/O: a request's bytes in, an answer's out. ``purposes`` are those that it signs for."""

    __slots__ = ("_key", "_public", "_purposes")

    def __init__(self, key: Signer, *, purposes: Collection[Purpose] = PURPOSES) -> None:
        if not set(purposes) <= PURPOSES:
            raise UsageError("an agent signs for a holder's purposes only")
        self._key, self._purposes = key, frozenset(purposes)
        self._public = key.verifying_key.to_bytes()

    def answer(self, request: bytes) -> bytes:
        """The encoded answer. It never raises: a refusal is a code."""
        try:
            return self._answer(AgentRequest.parse(request)).encode()
        except MalformedError as error:
            return AgentAnswer(self._public, b"", error.code).encode()

    def _answer(self, request: AgentRequest) -> AgentAnswer:
        if not request.purpose:
            return AgentAnswer(self._public, b"", "")
        if request.purpose not in self._purposes or len(request.message) > MAX_SIGNED:
            return AgentAnswer(self._public, b"", "agent_refused")
        return AgentAnswer(self._public, self._key.sign(Purpose(request.purpose), request.message), "")


def frame(body: bytes) -> bytes:
    """A message as it goes over the socket: its length, 4 bytes big-endian, before it."""
    return _LENGTH.pack(len(body)) + body


def read_frame(sock: socket.socket) -> bytes:
    """One message; empty at the end of the connection. Raises MalformedError when it is too long or cut off."""
    head = _read(sock, _LENGTH.size)
    if not head:
        return b""
    (size,) = _LENGTH.unpack(head)
    if not 0 < size <= MAX_FRAME:
        raise MalformedError("a message of the agent is too long, or empty")
    body = _read(sock, size)
    if not body:
        raise MalformedError("a message of the agent was cut off")
    return body


def _read(sock: socket.socket, size: int) -> bytes:
    got = bytearray()
    while len(got) < size:
        part = sock.recv(size - len(got))
        if not part:
            if got:
                raise MalformedError("a message of the agent was cut off")
            return b""
        got += part
    return bytes(got)


def peer_user(sock: socket.socket) -> int:
    """The user at the other end of a Unix socket, as the kernel vouches for it."""
    _, user, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(user)


def _user() -> int:
    return os.geteuid()


class AgentServer:
    """An Agent at ``unix:/path``. The file is made for its user alone. Raises UsageError or StorageError."""

    def __init__(self, agent: Agent, address: str) -> None:
        if not address.startswith("unix:"):
            raise UsageError("an agent listens on a Unix socket only", hint="--listen unix:/path")
        self._agent, self.address = agent, address
        self._free = threading.BoundedSemaphore(MAX_CLIENTS)
        mask = os.umask(0o177)
        try:
            self._sock, _ = bound_socket(address)
        finally:
            os.umask(mask)

    def run(self) -> None:
        """Serve until ``close``. A client that misbehaves ends its own connection and no other."""
        while True:
            try:
                sock, _ = self._sock.accept()
            except OSError:
                return
            if not self._free.acquire(blocking=False):
                sock.close()
                continue
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            with sock, contextlib.suppress(OSError, MalformedError):
                if peer_user(sock) != _user():
                    return
                while body := read_frame(sock):
                    sock.sendall(frame(self._agent.answer(body)))
        finally:
            self._free.release()

    def close(self) -> None:
        with contextlib.suppress(OSError, StorageError):
            close_listening(self._sock, self.address)
