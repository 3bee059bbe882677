"""Tokens: a chain of signed blocks, bound to holders, that anyone can verify and nobody can widen.

    >>> from isolate.crypto.signing import SigningKey
    >>> owner, team = SigningKey.generate(), SigningKey.generate()
    >>> token = grant(owner, asset="digits", scope=Scope(operations={"classify": bytes(32)}, uses=100),
    ...     holder=team.verifying_key.ed25519)
    >>> narrowed = token.attenuate(team, Scope(uses=10))
    >>> verify(narrowed, owner.verifying_key.ed25519, now=0).scope.uses
    10
    >>> Token.from_text(narrowed.to_text()) == narrowed
    True

A token is no secret and no bearer: it is of use only with the private key of its last holder, who signs each
invocation. A *handle* is a prefix of a chain; its id is 32 bytes. docs/spec/capability.md, 3. Bytes and keys are
refused with CapabilityRefused (code ``token_malformed`` where they break the format), the wrong key with
HolderRefused.
"""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from hashlib import sha256
from hmac import compare_digest
from typing import Any, Self

from attrs import evolve, field, frozen

from isolate.capability.scope import Scope, meet
from isolate.crypto import cbor
from isolate.crypto.signing import (
    ED25519_SIGNATURE,
    Purpose,
    Signer,
    from_text,
    is_public_key,
    is_small_order,
    to_text,
)
from isolate.crypto.signing import verify as verify_signature
from isolate.errors import CapabilityRefused, HolderRefused, IsolateError, MalformedError, UsageError

MAX_BLOCKS = 8
MAX_TOKEN = 4096  # bytes encoded
MAX_ASSET = 128  # characters
NONCE_SIZE = 16
ID_SIZE = 32
KEY_SIZE = 32

_PREFIX = "isolate-token-"
_HANDLE = b"isolate/v1/capability/handle\0"
_MADE_HERE = object()


def _malformed(message: str) -> CapabilityRefused:
    return CapabilityRefused(f"the token is malformed: {message}", code="token_malformed")


def _check_asset(asset: object) -> str:
    if not isinstance(asset, str) or not 1 <= len(asset) <= MAX_ASSET or not asset.isprintable():
        raise _malformed(f"an asset's name is 1 to {MAX_ASSET} printable characters")
    return asset


def _check_epoch(epoch: object) -> int:
    if type(epoch) is not int or not 1 <= epoch < 2**63:
        raise _malformed("an epoch is a number from 1")
    return epoch


@frozen
class Block:
    """What one block says; ``owner``, ``asset`` and ``epoch`` are in the first only. Keys are Ed25519, 32 bytes."""

    scope: Scope
    holder: bytes
    nonce: bytes
    owner: bytes | None = None
    asset: str | None = None
    epoch: int | None = None

    def encode(self) -> bytes:
        value: dict[str, Any] = {"holder": self.holder, "nonce": self.nonce, "scope": self.scope.to_value()}
        if self.owner is not None:
            value |= {"asset": self.asset, "epoch": self.epoch, "owner": self.owner}
        return cbor.encode(value)

    @classmethod
    def parse(cls, data: bytes, *, first: bool) -> Self:
        """Raises CapabilityRefused."""
        expected: dict[str, type] = {"holder": bytes, "nonce": bytes, "scope": dict}
        if first:
            expected |= {"asset": str, "epoch": int, "owner": bytes}
        try:
            value: dict[str, Any] = cbor.record(data, expected, max_size=MAX_TOKEN)
        except MalformedError as error:
            raise _malformed(error.message) from None
        if len(value["nonce"]) != NONCE_SIZE:
            raise _malformed(f"a nonce is {NONCE_SIZE} bytes")
        for name in ("holder", "owner"):
            # Such a key would let anyone sign for its holder. libsodium refuses it as well, but only when it
            # verifies; whether the key is on the curve at all may wait until then.
            if name in value and (len(value[name]) != KEY_SIZE or is_small_order(value[name])):
                raise _malformed(f"the {name} is no Ed25519 public key")
        scope = Scope.from_value(value["scope"])
        if not first:
            return cls(scope, value["holder"], value["nonce"])
        if scope.operations is None:
            raise _malformed("a grant names its operations: there is nothing that it could inherit them from")
        return cls(
            scope, value["holder"], value["nonce"], value["owner"], _check_asset(value["asset"]),
            _check_epoch(value["epoch"]),
        )  # fmt: skip


def _handles(blocks: tuple[bytes, ...]) -> tuple[bytes, ...]:
    """The id of every prefix: each is the hash of the id before it and of its block."""
    ids: list[bytes] = []
    for block in blocks:
        ids.append(sha256(_HANDLE + (ids[-1] if ids else bytes(ID_SIZE)) + block).digest())
    return tuple(ids)


def _depths(blocks: tuple[Block, ...]) -> list[int]:
    """How many blocks may follow each prefix; below zero where more do than an earlier block allowed."""
    depths: list[int] = []
    for number, block in enumerate(blocks):
        left = MAX_BLOCKS - 1 if number == 0 else depths[-1] - 1
        depths.append(left if block.scope.depth is None else min(left, block.scope.depth))
    return depths


@frozen
class Token:
    """A well-formed chain, whose signatures nobody has verified yet: what it says is only a claim.

    ``blocks`` are the encoded blocks and ``signatures`` one for each (64 bytes). Make one with ``grant``,
    ``attenuate``, ``parse`` or ``from_text``; anything malformed raises CapabilityRefused.
    """

    blocks: tuple[bytes, ...] = field(repr=False)
    signatures: tuple[bytes, ...] = field(repr=False)
    claims: tuple[Block, ...] = field(init=False, repr=False, eq=False)
    handles: tuple[bytes, ...] = field(init=False, repr=lambda ids: f"<{len(ids)}, last {ids[-1].hex()[:16]}>")

    def __attrs_post_init__(self) -> None:
        if not 1 <= len(self.blocks) <= MAX_BLOCKS or len(self.blocks) != len(self.signatures):
            raise _malformed(f"a chain has 1 to {MAX_BLOCKS} blocks, and a signature for each")
        if any(len(signature) != ED25519_SIGNATURE for signature in self.signatures):
            raise _malformed("a signature is 64 bytes")
        size = len(self.encode())
        if size > MAX_TOKEN:
            raise _malformed(f"it takes {size} bytes, where at most {MAX_TOKEN} are allowed")
        claims = tuple(Block.parse(raw, first=number == 0) for number, raw in enumerate(self.blocks))
        object.__setattr__(self, "claims", claims)
        object.__setattr__(self, "handles", _handles(self.blocks))

    @property
    def asset(self) -> str:
        """The asset that the grant names."""
        return _check_asset(self.claims[0].asset)

    @property
    def holder(self) -> bytes:
        """The last holder's public key, 32 bytes."""
        return self.claims[-1].holder

    @property
    def id(self) -> bytes:
        """The id of this handle, 32 bytes: what a budget or a revocation names."""
        return self.handles[-1]

    @property
    def scope(self) -> Scope:
        """The effective scope that it claims: the meet of its blocks, with the depth that is left."""
        return _limits(self.claims)[-1]

    def attenuate(
        self, holder_key: Signer, scope: Scope, holder: bytes | None = None, *, nonce: bytes | None = None
    ) -> Token:
        """Append a block, offline: narrower by ``scope``, for ``holder`` (or still for the same one).

        The new handle has accounts of its own below this one's; ``nonce`` (16 random bytes) tells apart two that
        are otherwise alike. Raises HolderRefused if the key is not the last holder's, CapabilityRefused beyond
        the allowed depth, 8 blocks or 4 KiB.
        """
        if holder_key.verifying_key.ed25519 != self.holder:
            raise HolderRefused("only the holder of a token's last block can narrow it or pass it on")
        if _depths(self.claims)[-1] <= 0:
            raise CapabilityRefused("this handle may not be passed on any further", code="depth_exceeded")
        block = Block(scope, self.holder if holder is None else _check_holder(holder), _nonce(nonce)).encode()
        handle = _handles((*self.blocks, block))[-1]
        signature = holder_key.sign(Purpose.BLOCK, handle)
        return Token((*self.blocks, block), (*self.signatures, signature))

    def encode(self) -> bytes:
        """Deterministic CBOR, at most 4 KiB."""
        return cbor.encode({"blocks": list(self.blocks), "signatures": list(self.signatures), "version": 1})

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read it. Raises CapabilityRefused."""
        try:
            value = cbor.record(data, {"blocks": list, "signatures": list, "version": int}, max_size=MAX_TOKEN)
        except MalformedError as error:
            raise _malformed(error.message) from None
        if value["version"] != 1:
            raise _malformed("it is of another version")
        if any(type(one) is not bytes for one in (*value["blocks"], *value["signatures"])):
            raise _malformed("blocks and signatures are bytes")
        return cls(tuple(value["blocks"]), tuple(value["signatures"]))

    def to_text(self) -> str:
        """One line for a file: ``isolate-token-`` and base64url with a checksum."""
        return to_text(_PREFIX, self.encode())

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read such a line. Raises CapabilityRefused."""
        text = text.strip()
        size = (len(text) - len(_PREFIX)) * 3 // 4 - 4
        if not 0 < size <= MAX_TOKEN:
            raise _malformed("the text is too short or too long")
        try:
            raw = from_text(_PREFIX, text, size, "token")
        except IsolateError as error:
            raise _malformed(error.message) from None
        return cls.parse(raw)


def _nonce(nonce: bytes | None) -> bytes:
    return secrets.token_bytes(NONCE_SIZE) if nonce is None else nonce


def _check_holder(holder: bytes) -> bytes:
    if not is_public_key(holder):
        raise _malformed("the holder is no Ed25519 public key")
    return holder


def grant(
    owner: Signer, *, asset: str, scope: Scope, holder: bytes, epoch: int = 1, nonce: bytes | None = None
) -> Token:
    """The owner's grant: a chain of one block. ``scope`` must name its operations. Raises CapabilityRefused.

    ``epoch`` is that of the service which keeps the budgets: when it is recovered, grants of before have ended.
    """
    claim = Block(
        scope, _check_holder(holder), _nonce(nonce), owner.verifying_key.ed25519, _check_asset(asset),
        _check_epoch(epoch),
    )  # fmt: skip
    block = claim.encode()
    return Token((block,), (owner.sign(Purpose.GRANT, _handles((block,))[0]),))


def _limits(claims: tuple[Block, ...]) -> tuple[Scope, ...]:
    """The effective scope of every prefix, with the depth that is left to it."""
    limits: list[Scope] = []
    for claim, depth in zip(claims, _depths(claims), strict=True):
        scope = meet(limits[-1], claim.scope) if limits else claim.scope
        limits.append(evolve(scope, depth=max(depth, 0)))
    return tuple(limits)


@frozen
class VerifiedToken:
    """A chain whose every signature and limit was verified: made only by ``verify``.

    asset    the asset that the owner granted
    epoch    the service's epoch that it was granted in
    owner    the owner's public key, 32 bytes
    scope    the effective scope: the meet of all blocks, with the depth that is left
    handles  the id of every prefix, from the grant to this handle, 32 bytes each: the accounts to charge, and
             what a revocation of any of them names
    limits   the effective scope of every prefix, in the same order
    holders  the holder of every prefix, in the same order
    """

    asset: str
    epoch: int
    owner: bytes
    scope: Scope
    handles: tuple[bytes, ...]
    limits: tuple[Scope, ...]
    holders: tuple[bytes, ...]
    _made: object = field(repr=False, eq=False)

    def __attrs_post_init__(self) -> None:
        if self._made is not _MADE_HERE:
            raise UsageError("a VerifiedToken is made by verify only")
        # Not kept, so that attrs.evolve cannot make another one of it.
        object.__setattr__(self, "_made", None)

    @property
    def id(self) -> bytes:
        """The id of this handle."""
        return self.handles[-1]

    @property
    def holder(self) -> bytes:
        """The last holder's public key, who alone can invoke."""
        return self.holders[-1]

    @property
    def lease(self) -> int:
        """The most uses of one lease; 0 is none. The owner's own block opts in: a later one only lowers it."""
        return 0 if self.limits[0].lease is None else self.scope.lease or 0


class ChainCache:
    """Chains that were verified, by the hash of their bytes and the owner, least recently used out first.

    It saves signatures, never decisions: time is checked on every call, and budgets and revocation are asked of
    the service each time. Refusals are not kept. Safe to share between threads.
    """

    __slots__ = ("_chains", "_lock", "_size")

    def __init__(self, size: int = 1024) -> None:
        self._size = size
        self._chains: OrderedDict[bytes, VerifiedToken] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: bytes) -> VerifiedToken | None:
        with self._lock:
            chain = self._chains.get(key)
            if chain is not None:
                self._chains.move_to_end(key)
            return chain

    def put(self, key: bytes, chain: VerifiedToken) -> None:
        with self._lock:
            self._chains[key] = chain
            while len(self._chains) > self._size:
                self._chains.popitem(last=False)


def _chain(token: Token, owner: bytes) -> VerifiedToken:
    if not compare_digest(token.claims[0].owner or b"", owner):  # 2
        raise CapabilityRefused("the token was granted by another owner")
    if not verify_signature(owner, Purpose.GRANT, token.handles[0], token.signatures[0]):
        raise CapabilityRefused("the owner's signature on the token is false")
    for number in range(1, len(token.blocks)):  # 3
        holder = token.claims[number - 1].holder
        if not verify_signature(holder, Purpose.BLOCK, token.handles[number], token.signatures[number]):
            raise CapabilityRefused(f"block {number} of the token is not signed by the holder before it")
    if min(_depths(token.claims)) < 0:  # 4
        raise CapabilityRefused("the token was passed on further than allowed", code="depth_exceeded")
    limits = _limits(token.claims)  # 5
    holders = tuple(claim.holder for claim in token.claims)
    epoch = _check_epoch(token.claims[0].epoch)
    return VerifiedToken(token.asset, epoch, owner, limits[-1], token.handles, limits, holders, _MADE_HERE)


def verify(
    token: Token | bytes, owner: bytes, *, now: int, epoch: int | None = None, cache: ChainCache | None = None
) -> VerifiedToken:
    """Verify a token against the owner's Ed25519 key (32 bytes), at ``now`` (unix seconds) of a trusted clock.

    1. It is well formed: 1 to 8 blocks, at most 4 KiB, one encoding, nothing unknown, only usable keys.
    2. Its grant names this owner and is signed by it.
    3. Every further block is signed by the holder of the block before, over all before it.
    4. No more blocks follow than any block allows.
    5. The effective scope is the meet of all blocks.
    6. ``now`` is within its validity.
    7. It was granted in this ``epoch`` of the service. None leaves that to the service, who decides it anyway.

    Raises CapabilityRefused. ``cache`` remembers 1 to 5 for these very bytes; give it the encoded token, and
    even parsing is saved.
    """
    if len(owner) != KEY_SIZE:
        raise UsageError("the owner's public key is 32 bytes")
    raw = token.encode() if isinstance(token, Token) else bytes(token)
    key = sha256(owner + raw).digest()
    chain = None if cache is None else cache.get(key)
    if chain is None:
        chain = _chain(token if isinstance(token, Token) else Token.parse(raw), owner)
        if cache is not None:
            cache.put(key, chain)
    chain.scope.check_time(now)  # 6
    if epoch is not None and chain.epoch != epoch:  # 7
        raise CapabilityRefused(
            "the service was recovered since this was granted", code="epoch_ended", hint="ask for a new grant"
        )
    return chain
