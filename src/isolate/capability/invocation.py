"""Invocations: the holder's proof for one use, over one channel, of one operation on these very arguments.

The example is in the package's docstring; the hash of the arguments is made the same way on both sides:

    >>> hash_arguments(b"encoded").hex()[:16]
    'cad0e9d452f20a1c'

docs/spec/capability.md, 4. Hashes, digests and bindings are 32 bytes. A proof that is not for this call raises
HolderRefused, an operation that the handle does not allow ScopeExceeded, anything else CapabilityRefused.
"""

from __future__ import annotations

from hashlib import sha256
from hmac import compare_digest
from struct import Struct
from typing import Self

from attrs import field, frozen

from isolate.capability.token import Token, VerifiedToken
from isolate.crypto.signing import ED25519_SIGNATURE, Purpose, Signer, verify
from isolate.errors import CapabilityRefused, HolderRefused, UsageError

VERSION = 1
MAX_COUNTER = 2**63 - 1
MAX_NAME = 64  # bytes of an operation's name, which is ASCII
NONCE_SIZE = 16

# Version, counter, handle, digest of the operation, hash of the arguments, channel binding, nonce; the operation's
# name is what comes after. Of a fixed form, because each use is made once and read twice.
_FORM = Struct(f">BQ32s32s32s32s{NONCE_SIZE}s")

_ARGUMENTS = b"isolate/v1/capability/arguments\0"
_INVOCATION = b"isolate/v1/capability/invocation-id\0"
_MADE_HERE = object()


def hash_arguments(encoded: bytes) -> bytes:
    """The hash that an invocation is bound to, of the arguments exactly as they travel."""
    return sha256(_ARGUMENTS + encoded).digest()


def _malformed(message: str) -> CapabilityRefused:
    return CapabilityRefused(f"the invocation is malformed: {message}", code="invocation_malformed")


@frozen
class Invocation:
    """One request to use a handle, signed by its holder; only a claim until ``verify_invocation``.

    ``body`` is what was signed. Make one with ``sign`` or ``parse``.
    """

    body: bytes = field(repr=False)
    signature: bytes = field(repr=False)
    handle: bytes = field(init=False, eq=False)
    operation: str = field(init=False, eq=False)
    operation_digest: bytes = field(init=False, eq=False, repr=False)
    argument_hash: bytes = field(init=False, eq=False, repr=False)
    channel_binding: bytes = field(init=False, eq=False, repr=False)
    nonce: bytes = field(init=False, eq=False)
    counter: int = field(init=False, eq=False)

    def __attrs_post_init__(self) -> None:
        if len(self.signature) != ED25519_SIGNATURE:
            raise _malformed("a signature is 64 bytes")
        if not 1 <= len(self.body) - _FORM.size <= MAX_NAME:
            raise _malformed("it is too short or too long")
        version, counter, handle, digest, arguments, binding, nonce = _FORM.unpack_from(self.body)
        try:
            operation = self.body[_FORM.size :].decode("ascii")
        except UnicodeDecodeError:
            raise _malformed("the name of its operation is not ASCII") from None
        if version != VERSION:
            raise _malformed("it is of another version")
        if counter > MAX_COUNTER:
            raise _malformed("its counter is out of bounds")
        keep = object.__setattr__
        keep(self, "counter", counter)
        keep(self, "handle", handle)
        keep(self, "operation_digest", digest)
        keep(self, "argument_hash", arguments)
        keep(self, "channel_binding", binding)
        keep(self, "nonce", nonce)
        keep(self, "operation", operation)

    @classmethod
    def sign(
        cls,
        token: Token,
        holder_key: Signer,
        *,
        operation: str,
        operation_digest: bytes,
        argument_hash: bytes,
        channel_binding: bytes,
        nonce: bytes,
        counter: int,
    ) -> Self:
        """Sign one use. ``nonce`` (16 bytes) is never used again, ``counter`` grows over a channel.

        Raises HolderRefused if the key is not the token's last holder's, CapabilityRefused for sizes.
        """
        if holder_key.verifying_key.ed25519 != token.holder:
            raise HolderRefused("this key is not the one that the token was issued to")
        hashes = (token.id, operation_digest, argument_hash, channel_binding, nonce)
        for part, size in zip(hashes, (32, 32, 32, 32, NONCE_SIZE), strict=True):
            # Packing would fill up what is too short, and cut off what is too long.
            if type(part) is not bytes or len(part) != size:
                raise _malformed("a field has not its length")
        if type(counter) is not int or not 0 <= counter <= MAX_COUNTER:
            raise _malformed("its counter is out of bounds")
        try:
            body = _FORM.pack(VERSION, counter, *hashes) + operation.encode("ascii")
        except UnicodeEncodeError:
            raise _malformed("the name of its operation is not ASCII") from None
        return cls(body, holder_key.sign(Purpose.INVOCATION, body))

    @property
    def id(self) -> bytes:
        """What the log and the accounts call this invocation, 32 bytes."""
        return sha256(_INVOCATION + self.body).digest()

    def encode(self) -> bytes:
        """The signature, then the body: at most 281 bytes."""
        return self.signature + self.body

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read it. Raises CapabilityRefused."""
        return cls(data[ED25519_SIGNATURE:], data[:ED25519_SIGNATURE])


@frozen
class VerifiedInvocation:
    """A use that its holder asked for, here and now, within the scope: made only by ``verify_invocation``.

    Whether it may still happen (budget, revocation, time, a repeated nonce) is for the service to decide.
    """

    token: VerifiedToken
    id: bytes
    operation: str
    operation_digest: bytes
    argument_hash: bytes
    channel_binding: bytes
    nonce: bytes
    counter: int
    _made: object = field(repr=False, eq=False)

    def __attrs_post_init__(self) -> None:
        if self._made is not _MADE_HERE:
            raise UsageError("a VerifiedInvocation is made by verify_invocation only")
        # Not kept, so that attrs.evolve cannot make another one of it.
        object.__setattr__(self, "_made", None)


def verify_invocation(
    invocation: Invocation, verified_token: VerifiedToken, *, channel_binding: bytes, argument_hash: bytes
) -> VerifiedInvocation:
    """Verify one use of a verified token.

    1. It was made for this very handle.
    2. The holder of its last block signed it.
    3. It was made for this channel: ``channel_binding`` is the verifier's own.
    4. It was made for these arguments: ``argument_hash`` is the verifier's own, of what it received.
    5. The operation, by name and digest, is in the effective scope.

    Raises HolderRefused (1 to 4) or ScopeExceeded (5). The caller runs only the operation whose own digest is
    ``operation_digest``, checks its arguments with ``scope.check_arguments``, and asks a ReplayGuard.
    """
    if not compare_digest(invocation.handle, verified_token.id):  # 1
        raise HolderRefused("the invocation was made for another handle")
    if not verify(verified_token.holder, Purpose.INVOCATION, invocation.body, invocation.signature):  # 2
        raise HolderRefused("the invocation is not signed by the holder of the token")
    if not compare_digest(invocation.channel_binding, channel_binding):  # 3
        raise HolderRefused("the invocation was made for another channel")
    if not compare_digest(invocation.argument_hash, argument_hash):  # 4
        raise HolderRefused("the invocation was made for other arguments")
    verified_token.scope.check_operation(invocation.operation, invocation.operation_digest)  # 5
    return VerifiedInvocation(
        verified_token,
        invocation.id,
        invocation.operation,
        invocation.operation_digest,
        invocation.argument_hash,
        invocation.channel_binding,
        invocation.nonce,
        invocation.counter,
        _MADE_HERE,
    )


class ReplayGuard:
    """One per channel, on the verifier's side: takes each invocation once, and in order.

    Another channel has another binding, so the counter alone is enough here; that a nonce is used once across
    everything is checked where the budget is committed.
    """

    __slots__ = ("_binding", "_last")

    def __init__(self, channel_binding: bytes) -> None:
        self._binding, self._last = channel_binding, -1

    def admit(self, invocation: VerifiedInvocation) -> None:
        """Raise CapabilityRefused (code ``replayed``) unless its counter is above every one before it."""
        if not compare_digest(invocation.channel_binding, self._binding):
            raise CapabilityRefused("the invocation was verified for another channel", code="replayed")
        if invocation.counter <= self._last:
            raise CapabilityRefused(
                f"the counter {invocation.counter} was used on this channel already", code="replayed"
            )
        self._last = invocation.counter
