"""A handle: what a user holds instead of the data.

    handle = isolate.attach("team.handle", signer=isolate.FileSigner("me.key"))
    analyst = handle.attenuate(operations=["classify"], uses=10, holder=analyst_public_key)
    handle.invoke("classify", image=x)

    >>> HandleFile.parse('token = 1')
    Traceback (most recent call last):
    ...
    isolate.errors.UsageError: token in a handle file is missing, or is no str

Mode: handle (docs/spec/capability.md). The handle file says where to go and whose root to believe, like any
client configuration: keep it from being changed. It holds no key; the key stays with the signer.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
import tomllib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

from attrs import evolve, frozen

from isolate import channel
from isolate.capability.invocation import Invocation, hash_arguments
from isolate.capability.scope import Scope
from isolate.capability.token import Token
from isolate.client.connect import certificate, expect_enclave
from isolate.crypto import cbor
from isolate.crypto.signing import Purpose, Signer, SigningKey, VerifyingKey
from isolate.errors import CapabilityRefused, ChannelError, HolderRefused, ScopeExceeded, StorageError, UsageError
from isolate.messages.base import Refusal, Signed
from isolate.messages.http import ask, error_of
from isolate.messages.invoke import Budget, BudgetRequest, Invoke, Reply, encode_argument

_FIELDS = {
    "token": str, "owner": str, "lineage": str, "service": str, "enclave": str, "job": str,
    "INSECURE_accept_simulated": bool,
}  # fmt: skip
_KIND = CapabilityRefused.default_code  # of a refusal whose code names no class
MAX_FILE = 64 * 1024  # bytes of a handle file; a token takes at most 5.5 KiB of them


@frozen
class HandleFile:
    """The token with what a client needs to use it: TOML, one line a field."""

    token: str
    owner: str
    lineage: str
    service: str
    enclave: str
    job: str
    INSECURE_accept_simulated: bool

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises UsageError."""
        try:
            fields = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError):
            raise UsageError("this is no handle file: it is no TOML") from None
        for name, kind in _FIELDS.items():
            if type(fields.get(name)) is not kind:
                raise UsageError(f"{name} in a handle file is missing, or is no {kind.__name__}")
        if unknown := set(fields) - set(_FIELDS):
            raise UsageError(f"a handle file has no {', '.join(sorted(unknown))}")
        return cls(**fields)

    def to_text(self) -> str:
        lines = [f"{name} = {_quoted(getattr(self, name))}" for name, kind in _FIELDS.items() if kind is str]
        flag = "true" if self.INSECURE_accept_simulated else "false"
        return "# isolate handle\n" + "\n".join([*lines, f"INSECURE_accept_simulated = {flag}"]) + "\n"


def _quoted(text: str) -> str:
    """A TOML basic string: JSON's, but that TOML also wants DEL escaped."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


class FileSigner:
    """A holder's key in a key file (`isolate keygen --signing`). Pass it wherever ``signer=`` is asked."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._key = SigningKey.load(path)

    @property
    def verifying_key(self) -> VerifyingKey:
        return self._key.verifying_key

    def sign(self, purpose: Purpose, message: bytes) -> bytes:
        return self._key.sign(purpose, message)

    def __repr__(self) -> str:
        return f"FileSigner({self.verifying_key.ed25519.hex()[:16]}, key hidden)"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise UsageError("a signer is not copied or pickled", hint="pass its path, and open it there")


class Handle:
    """Use without seeing. ``attach`` makes it."""

    def __init__(self, file: HandleFile, signer: Signer) -> None:
        self._file = file
        self._signer = signer
        self._token = Token.from_text(file.token)
        self._owner = VerifyingKey.parse(file.owner)
        self._channel: channel.Channel | None = None
        self._counter = 0
        # One request at a time: replies come in the order of the requests, and nothing else tells them apart.
        self._turn = threading.Lock()
        if self._token.holder != signer.verifying_key.ed25519:
            raise HolderRefused("this signer is not the holder of the token")

    @property
    def id(self) -> bytes:
        """The handle's id, 32 bytes: what `isolate revoke` takes."""
        return self._token.id

    def attenuate(
        self,
        *,
        operations: Sequence[str] | None = None,
        uses: int | None = None,
        expires: int | None = None,
        holder: bytes | None = None,
    ) -> HandleFile:
        """A narrower handle, offline, for ``holder`` (Ed25519, 32 bytes; this one's when not given).

        ``operations`` are names that this handle has. What is not given is inherited; nothing can be widened.
        Raises ScopeExceeded for an operation that it does not have.
        """
        mine = self._token.scope.operations or {}
        if operations is not None and (unknown := set(operations) - set(mine)):
            raise ScopeExceeded(f"this handle has no operation {', '.join(sorted(unknown))}")
        kept = None if operations is None else {name: mine[name] for name in operations}
        token = self._token.attenuate(self._signer, Scope(operations=kept, uses=uses, expires=expires), holder)
        return evolve(self._file, token=token.to_text())

    def invoke(self, operation: str, **arguments: Any) -> Any:
        """Run one operation in the enclave. Arrays travel as bytes of their own dtype.

        Raises the typed refusal with its code and request id, or a ChannelError.
        """
        digest = (self._token.scope.operations or {}).get(operation)
        if digest is None:
            raise ScopeExceeded(f"this handle has no operation {operation!r}")
        return self._send(operation, digest, arguments)

    def _send(self, operation: str, digest: bytes, arguments: dict[str, Any]) -> Any:
        encoded = {name: encode_argument(value) for name, value in arguments.items()}
        with self._turn:
            try:
                reply = self._exchange(operation, digest, encoded)
            except ChannelError:
                # This channel is over; the next use opens another.
                self.close()
                raise
        if reply.code:
            raise error_of(Refusal(reply.code, f"the enclave refused {operation}", "", reply.request_id, _KIND))
        return reply.value

    def _exchange(self, operation: str, digest: bytes, encoded: dict[str, Any]) -> Reply:
        open_channel = self._connect()
        self._counter += 1
        invocation = Invocation.sign(
            self._token,
            self._signer,
            operation=operation,
            operation_digest=digest,
            argument_hash=hash_arguments(cbor.encode(encoded)),
            channel_binding=open_channel.binding,
            nonce=secrets.token_bytes(16),
            counter=self._counter,
        )
        open_channel.send(Invoke(self._token.encode(), invocation.encode(), encoded).padded())
        return Reply.parse(bytes(open_channel.recv()))

    def _connect(self) -> channel.Channel:
        if self._channel is None:
            found = certificate(self._file.service, self._owner, self._file.lineage)
            expect = expect_enclave(
                found,
                job=self._file.job,
                least_sequence=0,
                INSECURE_accept_simulated=self._file.INSECURE_accept_simulated,
            )
            holder = channel.Holder(key=self._signer)
            self._channel = channel.connect(
                self._file.enclave, identity=holder, expect=expect, profile="client", purpose="invoke"
            )
        return self._channel

    @property
    def budget(self) -> Budget:
        """What is left, by the service: the least over this handle and those it comes from."""
        found = certificate(self._file.service, self._owner, self._file.lineage)
        body = BudgetRequest(self._token.encode()).encode()
        request = Signed.make(Purpose.HOLDER_REQUEST, self._signer, body, secrets.token_bytes(32), found.name)
        return ask(self._file.service, "budget", request, Budget, found.release_key)

    def export(self) -> HandleFile:
        """The handle as a file's content, to attach again elsewhere. It holds no key."""
        return self._file

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
            self._counter = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        scope = self._token.scope
        names = ", ".join(sorted(scope.operations or {}))
        uses = "any number of" if scope.uses is None else f"at most {scope.uses}"
        return f"<Handle on {self._token.asset}: {names}; {uses} uses>"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise UsageError("a handle is not copied or pickled", hint="pass its export(), and attach it there")


def attach(handle: str | os.PathLike[str] | HandleFile, *, signer: Signer) -> Handle:
    """Open a handle file with the holder's signer.

    Raises HolderRefused when the signer is not the token's holder, CapabilityRefused for a bad token, UsageError.
    """
    if isinstance(handle, HandleFile):
        return Handle(handle, signer)
    try:
        with Path(handle).open("rb") as file:
            text = file.read(MAX_FILE).decode()
    except OSError as error:
        raise StorageError(f"cannot read {os.fspath(handle)}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError("this is no handle file") from None
    return Handle(HandleFile.parse(text), signer)
