"""Who signs for a holder: a key file, or an agent that keeps the key in a process of its own.

    >>> signer = AgentSigner("unix:/nonexistent/agent.sock")
    >>> signer.verifying_key
    Traceback (most recent call last):
    ...
    isolate.errors.UnavailableError: no agent answers at unix:/nonexistent/agent.sock (start one: `isolate agent`)

Mode: handle. A holder's key never stands in a field of a handle: it belongs to a signer. Anything with
``verifying_key`` and ``sign(purpose, message)`` is one (``isolate.crypto.signing.Signer``).
"""

from __future__ import annotations

import os
import socket
import threading
from typing import Any, ClassVar

from isolate.channel.streams import parse_address
from isolate.client.agent import AgentAnswer, AgentRequest, frame, read_frame
from isolate.client.boundary import NotCopied, bare, forks
from isolate.crypto.signing import Purpose, SigningKey, VerifyingKey
from isolate.errors import HolderRefused, MalformedError, RefusedError, UnavailableError, UsageError

TIMEOUT = 10.0  # seconds for one signature


class FileSigner(NotCopied):
    """A holder's key in a key file (`isolate keygen --signing`). Pass it wherever ``signer=`` is asked.

    Once it was read, no Python object holds it or the file's line: what signs lies in the cryptographic libraries'
    memory, and freed memory may still have a copy. Code in the same process that means to can get at it: an
    AgentSigner keeps the key elsewhere. Raises KeyFormatError or StorageError, which show nothing of the file.
    """

    __slots__ = ("_key",)

    WHY: ClassVar[str] = "a signer is not copied or pickled"
    INSTEAD: ClassVar[str] = "pass its path, and open it there; or pass an AgentSigner"

    @bare
    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._key = SigningKey.load(path)
        self._key.forget_seed()

    @property
    def verifying_key(self) -> VerifyingKey:
        return self._key.verifying_key

    @bare
    def sign(self, purpose: Purpose, message: bytes) -> bytes:
        """An Ed25519 signature, 64 bytes."""
        return self._key.sign(purpose, message)

    def __repr__(self) -> str:
        return f"FileSigner({self.verifying_key.ed25519.hex()[:16]}, key hidden)"


class AgentSigner:
    """The key of an agent (`isolate agent`) at ``unix:/path``, which signs and never shows it.

    It connects when it is first used, again when the agent was restarted, and anew in a forked child; threads may
    share it. It holds an address only, so it may be pickled: that is how a worker gets its signer. Raises
    UnavailableError (code ``agent_unavailable``) when nobody answers within 10 seconds, RefusedError (code
    ``agent_refused``) for what the agent does not sign, HolderRefused when it has another key than before.
    """

    __slots__ = ("__weakref__", "_address", "_key", "_path", "_sock", "_turn")

    def __init__(self, address: str) -> None:
        self._address = address
        kind, self._path = parse_address(address)
        if kind != "unix":
            raise UsageError("an agent listens on a Unix socket", hint="unix:/path")
        self._key: VerifyingKey | None = None
        self._sock: socket.socket | None = None
        self._turn = threading.Lock()
        forks(self)

    @property
    @bare
    def verifying_key(self) -> VerifyingKey:
        return self._key or self._ask("", b"")[0]

    @bare
    def sign(self, purpose: Purpose, message: bytes) -> bytes:
        """An Ed25519 signature, 64 bytes."""
        key, signature = self._ask(purpose, message)
        if not key.verify(purpose, message, signature):
            raise HolderRefused("the agent's signature is not by the key that it shows")
        return signature

    def close(self) -> None:
        """End the connection; the next use makes another."""
        with self._turn:
            self._drop()

    def _ask(self, purpose: str, message: bytes) -> tuple[VerifyingKey, bytes]:
        request = frame(AgentRequest(purpose, message).encode())
        with self._turn:
            answer = AgentAnswer.parse(self._exchange(request))
            key = VerifyingKey.from_bytes(answer.key)
            if self._key is not None and key != self._key:
                raise HolderRefused("the agent has another key than before", hint="attach again")
            self._key = key
        if answer.code:
            raise RefusedError("the agent does not sign this", code="agent_refused")
        return key, answer.signature

    def _exchange(self, request: bytes) -> bytes:
        fresh = self._sock is None
        try:
            return self._once(request)
        except (OSError, MalformedError):
            # An agent that was restarted: what it was asked before it ended is asked again, and signing twice
            # does no harm.
            if not fresh:
                try:
                    return self._once(request)
                except (OSError, MalformedError):
                    pass
        raise UnavailableError(
            f"no agent answers at {self._address}", code="agent_unavailable", hint="start one: `isolate agent`"
        )

    def _once(self, request: bytes) -> bytes:
        try:
            if self._sock is None:
                self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                self._sock.settimeout(TIMEOUT)
                self._sock.connect(self._path)
            self._sock.sendall(request)
            body = read_frame(self._sock)
            if not body:
                raise ConnectionResetError
        except BaseException:
            # An answer that is still to come would be taken for the next one's.
            self._drop()
            raise
        return body

    def _drop(self) -> None:
        # Also from __del__, after an __init__ that raised.
        sock = getattr(self, "_sock", None)
        if sock is not None:
            sock.close()
            self._sock = None

    __del__ = _drop

    def _after_fork(self) -> None:
        # The parent's connection, and a lock that a thread may hold which is not here.
        self._turn = threading.Lock()
        self._drop()

    def __reduce__(self) -> tuple[type[Any], tuple[str]]:
        return AgentSigner, (self._address,)

    def __repr__(self) -> str:
        return f"AgentSigner({self._address!r})"


def open_signer(text: str) -> FileSigner | AgentSigner:
    """The signer that ``unix:/path`` or the path of a key file names, as commands take it."""
    return AgentSigner(text) if text.startswith("unix:") else FileSigner(text)
