"""What a handle is, without I/O: the token, who signs, what is shown. ``Handle`` and ``aio.AsyncHandle`` add it.

    >>> from isolate.capability.scope import Scope
    >>> from isolate.capability.token import grant
    >>> from isolate.crypto.signing import SigningKey
    >>> owner, me = SigningKey.generate(), SigningKey.generate()
    >>> token = grant(owner, asset="digits", scope=Scope(operations={"classify": bytes(32)}, uses=100),
    ...     holder=me.verifying_key.ed25519)
    >>> file = HandleFile(token.to_text(), str(owner.verifying_key), "acme", "unix:/s", "unix:/e", "job", False)
    >>> Held(file, me).attenuate(uses=10)
    <Held on digits: classify; at most 10 uses>

No field of it holds a key: the key is the signer's. Spec: docs/spec/capability.md, sections 3 and 4.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self, TypedDict, Unpack, overload

from attrs import evolve

from isolate.capability.invocation import Invocation, hash_arguments
from isolate.capability.scope import Constraint, Scope
from isolate.capability.token import Token
from isolate.client import shown
from isolate.client.boundary import NotCopied, bare, forks
from isolate.client.handle_file import HandleFile
from isolate.crypto import cbor
from isolate.crypto.secret import wipe
from isolate.crypto.signing import Purpose, Signer, VerifyingKey
from isolate.errors import CapabilityRefused, HolderRefused, LogRefused, ScopeExceeded, UsageError
from isolate.messages.attest import ServiceCertificate
from isolate.messages.base import Message, Refusal, Signed
from isolate.messages.http import error_of
from isolate.messages.invoke import Budget, BudgetRequest, Invoke, Reply, encode_argument
from isolate.messages.receipts import ReceiptRequest, UseReceipt

_KIND = CapabilityRefused.default_code  # of a refusal whose code names no class


class Limits(TypedDict, total=False):
    """Those of a Scope beside its operations."""

    uses: int | None
    bytes_out: int | None
    rates: Mapping[int, int] | None
    parameters: Mapping[str, Mapping[str, Constraint]] | None
    outputs: Mapping[str, tuple[int, ...]] | None
    minimum_group: int | None
    not_before: int | None
    expires: int | None
    depth: int | None
    lease: int | None


class Held(NotCopied):
    """The base of handles. Raises HolderRefused when ``signer`` is not the token's last holder, UsageError."""

    __slots__ = ("__weakref__", "_counter", "_file", "_last", "_owner", "_seen", "_signer", "_token")

    WHY: ClassVar[str] = "a handle is not copied or pickled"
    INSTEAD: ClassVar[str] = "pass its export(), and attach it there"

    def __init__(self, file: HandleFile, signer: Signer) -> None:
        self._file, self._signer, self._counter = file, signer, 0
        self._seen: shown.Seen | None = None
        self._last: bytes | None = None
        self._token = Token.from_text(file.token)
        self._owner = VerifyingKey.parse(file.owner)
        key = getattr(signer, "verifying_key", None)
        if not isinstance(key, VerifyingKey):
            raise UsageError("this is no signer", hint="isolate.FileSigner(path) or isolate.AgentSigner(address)")
        if self._token.holder != key.ed25519:
            raise HolderRefused("this signer is not the holder of the token")
        forks(self)

    @property
    def id(self) -> bytes:
        """The handle's id, 32 bytes: what `isolate revoke` takes."""
        return self._token.id

    @property
    def scope(self) -> Scope:
        """What the token allows, all its blocks together. Only enclave and service decide by it."""
        return self._token.scope

    @property
    def last_use(self) -> bytes | None:
        """The id of the last use that was asked for through this object, 32 bytes, whatever became of it."""
        return self._last

    @overload
    def attenuate(
        self, *, operations: Sequence[str] | None = None, holder: None = None, **limits: Unpack[Limits]
    ) -> Self: ...
    @overload
    def attenuate(
        self, *, operations: Sequence[str] | None = None, holder: bytes, **limits: Unpack[Limits]
    ) -> HandleFile: ...
    @bare
    def attenuate(
        self, *, operations: Sequence[str] | None = None, holder: bytes | None = None, **limits: Unpack[Limits]
    ) -> Self | HandleFile:
        """A narrower handle, offline: another of yours, or for a ``holder`` (Ed25519, 32 bytes) the file of theirs.

        ``operations`` are names that this handle has; the other limits are those of a Scope. What is not given is
        inherited; nothing can be widened. Raises ScopeExceeded for an operation that it does not have,
        CapabilityRefused when it may not be passed on, UsageError.
        """
        mine = self._token.scope.operations or {}
        if isinstance(operations, str):
            raise UsageError("operations is a list of names")
        if operations is not None and (unknown := set(operations) - set(mine)):
            raise ScopeExceeded(f"this handle has no operation {', '.join(sorted(map(str, unknown)))}")
        kept = None if operations is None else {name: mine[name] for name in operations}
        token = self._token.attenuate(self._signer, Scope(operations=kept, **limits), holder)
        file = evolve(self._file, token=token.to_text())
        return file if holder is not None else type(self)(file, self._signer)

    def export(self) -> HandleFile:
        """The handle as a file's content, to attach again elsewhere: it may be pickled, and holds no key."""
        return self._file

    def _digest(self, operation: str) -> bytes:
        digest = (self._token.scope.operations or {}).get(operation)
        if digest is None:
            raise ScopeExceeded(f"this handle has no operation {operation!r}")
        return digest

    @staticmethod
    def _encode(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], bytes]:
        """The arguments as they travel, and their hash."""
        encoded = {name: encode_argument(value) for name, value in arguments.items()}
        return encoded, hash_arguments(cbor.encode(encoded))

    def _request(
        self, operation: str, digest: bytes, encoded: dict[str, Any], hashed: bytes, binding: bytes
    ) -> bytes:
        """One Invoke for a channel with this binding."""
        self._counter += 1
        invocation = self._invocation(operation, digest, hashed, binding, self._counter)
        return Invoke(self._token.encode(), invocation.encode(), encoded).padded()

    @staticmethod
    def _check_joined(operation: str, joined: Mapping[str, Held], arguments: Mapping[str, Any]) -> None:
        if not joined:
            raise UsageError("without a second handle this is an ordinary invocation")
        if not joined.keys().isdisjoint(arguments):
            raise UsageError("an argument is given twice")
        for other in joined.values():
            other._digest(operation)

    def _request_joined(
        self,
        operation: str,
        digest: bytes,
        joined: Mapping[str, Held],
        encoded: Mapping[str, Any],
        hashed: bytes,
        binding: bytes,
    ) -> bytes:
        """The same with other handles as arguments (docs/spec/operations.md, 7)."""
        whole = dict(encoded)
        # This handle's own invocation covers the others, and is counted before them.
        for number, (name, other) in enumerate(sorted(joined.items()), self._counter + 2):
            invocation = other._invocation(operation, other._digest(operation), hashed, binding, number)
            whole[name] = {"token": other._token.encode(), "invocation": invocation.encode()}
        request = self._request(operation, digest, whole, hash_arguments(cbor.encode(whole)), binding)
        self._counter += len(joined)
        return request

    def _invocation(self, operation: str, digest: bytes, hashed: bytes, binding: bytes, counter: int) -> Invocation:
        made = Invocation.sign(
            self._token,
            self._signer,
            operation=operation,
            operation_digest=digest,
            argument_hash=hashed,
            channel_binding=binding,
            nonce=secrets.token_bytes(16),
            counter=counter,
        )
        self._last = made.id
        return made

    @staticmethod
    def _reply(raw: bytearray) -> Reply:
        """Read it, and wipe what it was read from: a channel keeps the last message that it gave out."""
        try:
            return Reply.parse(bytes(raw))
        finally:
            wipe(raw)

    @staticmethod
    def _value(operation: str, reply: Reply) -> Any:
        if reply.code:
            raise error_of(Refusal(reply.code, f"the enclave refused {operation}", "", reply.request_id, _KIND))
        return reply.value

    def _budget_request(self, found: ServiceCertificate) -> Signed:
        return self._signed(BudgetRequest(self._token.encode()), found)

    def _wanted(self, use: bytes | None) -> bytes:
        wanted = self._last if use is None else use
        if type(wanted) is not bytes or len(wanted) != 32:
            raise UsageError("which use?", hint="one was made through this object, or its id is 32 bytes")
        return wanted

    def _receipt_request(self, found: ServiceCertificate, use: bytes) -> Signed:
        return self._signed(ReceiptRequest(use), found)

    def _signed(self, body: Message, found: ServiceCertificate) -> Signed:
        return Signed.make(Purpose.HOLDER_REQUEST, self._signer, body.encode(), os.urandom(32), found.audience)

    def _checked(self, receipt: UseReceipt, use: bytes, found: ServiceCertificate) -> UseReceipt:
        said = receipt.check(found.release_key)
        if (said.invocation, receipt.about["asset"]) != (use, self._token.asset):
            raise LogRefused("this receipt is for another use")
        return receipt

    def _remember(self, budget: Budget) -> Budget:
        self._seen = shown.Seen(budget, time.monotonic())
        return budget

    def _after_fork(self) -> None:
        """Drop what a forked child must not share with its parent."""

    def __repr__(self) -> str:
        if not hasattr(self, "_token"):
            return f"<{type(self).__name__}, not attached>"  # in a traceback with locals
        return shown.text(type(self).__name__, self._token, self._seen, now=time.monotonic())

    def _repr_html_(self) -> str:
        return shown.table(type(self).__name__, self._token, self._seen, now=time.monotonic())

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return {"text/plain": repr(self), "text/html": self._repr_html_()}

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))
