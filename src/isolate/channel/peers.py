"""Who shows what, and what is expected of the other end (docs/spec/channel.md, 4).

    >>> from isolate.channel.peers import Expect
    >>> Expect(job="train", rank=1, issuer_key=bytes(32), clock=lambda: 1_700_000_000).rank
    1

A measurement alone is no pin: an operator can run the same code twice, and divert a connection to the twin. So
``job`` is always pinned, and ``rank`` or ``instance`` should be. Attestation says what code holds a key; it says
nothing about the machine's administrator where the tier is ``simulated``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Final

from attrs import field, frozen

from isolate.attestation import result as results
from isolate.attestation.appraisal import appraise
from isolate.attestation.evidence import KeyDigests
from isolate.attestation.policy import Policy
from isolate.attestation.result import AttestationResult
from isolate.crypto import cbor, signing
from isolate.crypto.exchange import CurveKey
from isolate.crypto.secret import Secret
from isolate.crypto.signing import Purpose, Signer, SigningKey, VerifyingKey
from isolate.errors import (
    AppraisalRefused,
    EvidenceRefused,
    HandshakeRefused,
    KeyFormatError,
    MalformedError,
    ResultRefused,
    UsageError,
)

MAX_SHOWN = 64000  # bytes: what fits into one message of the handshake, with MAX_WRAPPING around it
MAX_WRAPPING = 128  # bytes: the signature, and the names and lengths of both fields
MAX_KNOWN = 4096  # tokens whose signature is remembered as good

_MADE_HERE: Final = object()
_STATEMENT: Final = ("role", "hash", "exported", "initiator", "responder", "before")
_SIGNED: Final[dict[str, type]] = {"shown": bytes, "signature": bytes}
_KNOWN: Final[dict[tuple[str, bytes, bool], AttestationResult]] = {}


def _key_digests(keys: KeyDigests | Mapping[str, bytes]) -> KeyDigests:
    return keys if isinstance(keys, KeyDigests) else KeyDigests.of(keys)


@frozen(repr=False)
class Attested:
    """What an attested end shows: its result token and the keys that the token is about.

    ``keys`` are the digests (or the public keys) by purpose; ``static`` is the X25519 private key whose public half
    is the key "channel" among them, ``sign`` the key "sign". ``token`` may be a function, for long-lived listeners:
    it is asked at every handshake. ``evidence``, for peers whose policy asks for it, makes fresh evidence: from a
    nonce (32 bytes) to an encoded Envelope whose runtime map has that nonce, these keys and the token's slot.
    Raises UsageError when the two private keys are not the attested ones.
    """

    token: str | Callable[[], str]
    keys: KeyDigests = field(converter=_key_digests)
    static: Secret
    sign: SigningKey
    evidence: Callable[[bytes], bytes] | None = None
    curve: CurveKey = field(init=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "curve", CurveKey(self.static))
        try:
            self.keys.check("channel", self.curve.public)
            self.keys.check("sign", self.sign.verifying_key.to_bytes())
        except EvidenceRefused:
            raise UsageError("these private keys are not the ones that were attested") from None

    def current(self) -> str:
        return self.token if isinstance(self.token, str) else self.token()

    def __repr__(self) -> str:
        return f"Attested({self.sign!r})"


@frozen
class Holder:
    """What a client shows: the key that its capability tokens are bound to."""

    key: Signer


@frozen
class Expect:
    """The pins on an attested other end; whatever does not match is HandshakeRefused.

    ``rank`` and ``instance`` (32 bytes) may be None: any in the job. ``issuer_key`` (Ed25519, 32 bytes) is the
    service's; ``clock`` answers unix seconds. ``lineage`` None takes any policy of that service. ``group`` names
    the process group; both ends must agree on it. With a ``policy``, the peer must show fresh evidence too, made
    for this session, and it is appraised here.

    While the session lives: it ends when the peer's token ran out more than ``max_stale`` seconds ago and no newer
    one was shown, and when ``recheck`` raises an error of ours, which is asked every ``recheck_every`` seconds
    (whether the measurement was revoked, say). Raises UsageError for a pin of the wrong form.
    """

    job: str
    rank: int | None = None
    instance: bytes | None = None
    issuer_key: bytes = field(kw_only=True)
    clock: Callable[[], int] = field(kw_only=True)
    lineage: str | None = field(default=None, kw_only=True)
    least_sequence: int = field(default=0, kw_only=True)
    group: str = field(default="", kw_only=True)
    INSECURE_accept_simulated: bool = field(default=False, kw_only=True)
    max_stale: float | None = field(default=3600.0, kw_only=True)
    policy: Policy | None = field(default=None, kw_only=True)
    recheck: Callable[[AttestedPeer], None] | None = field(default=None, kw_only=True)
    recheck_every: float = field(default=30.0, kw_only=True)

    def __attrs_post_init__(self) -> None:
        if len(self.issuer_key) != 32 or (self.instance is not None and len(self.instance) != 32):
            raise UsageError("an issuer key and an instance are 32 bytes")
        if self.least_sequence < 0 or (self.rank is not None and self.rank < 0):
            raise UsageError("a rank and a least sequence are not negative")


class AttestedPeer:
    """An attested other end, as the handshake verified it. Nothing else makes one."""

    __slots__ = ("key", "result", "static")

    def __init__(self, made: object, result: AttestationResult, static: bytes, key: VerifyingKey) -> None:
        if made is not _MADE_HERE:
            raise UsageError("only a handshake makes an AttestedPeer")
        self.result, self.static, self.key = result, static, key

    def __repr__(self) -> str:
        return f"AttestedPeer(instance {self.result.instance.hex()[:16]}, slot {self.result.slot})"


class HolderPeer:
    """A client that proved its holder key (``public``, Ed25519, 32 bytes). Nothing but the handshake makes one."""

    __slots__ = ("public",)

    def __init__(self, made: object, public: bytes) -> None:
        if made is not _MADE_HERE:
            raise UsageError("only a handshake makes a HolderPeer")
        self.public = public

    def __repr__(self) -> str:
        return f"HolderPeer({self.public.hex()[:16]})"


@frozen
class Statement:
    """What both ends sign (docs/spec/channel.md, 4.3): everything that makes this session this session."""

    role: str
    hash: bytes
    exported: bytes
    initiator: bytes
    responder: bytes
    before: bytes  # SHA-256 of what the other side showed; empty for the initiator, who shows first

    @property
    def nonce(self) -> bytes:
        """What fresh evidence for this session and this role must carry, 32 bytes."""
        return hashlib.sha256(b"isolate/v1/channel/evidence\0" + cbor.encode(self._fields())).digest()

    def encode(self, shown: bytes) -> bytes:
        """The bytes that are signed, with what is shown."""
        return cbor.encode({**self._fields(), "shown": hashlib.sha256(shown).digest()})

    def _fields(self) -> dict[str, Any]:
        # Not attrs.asdict, which copies each value by its type and takes ten times longer.
        return {name: getattr(self, name) for name in _STATEMENT}


def show(identity: Attested | Holder, statement: Statement, *, fresh: bool = False) -> bytes:
    """The body of A1 or A2: what is shown, and the signature that ties it to the session.

    ``fresh``: the peer asks for fresh evidence. Raises HandshakeRefused when this end has none to show.
    """
    if isinstance(identity, Holder):
        shown = cbor.encode({"holder": identity.key.verifying_key.ed25519})
        key, purpose = identity.key, Purpose.CHANNEL_HOLDER
    else:
        token = identity.current()
        if len(token) > results.MAX_TOKEN:
            raise UsageError(f"a result token is at most {results.MAX_TOKEN} characters")
        sign = identity.sign.verifying_key.to_bytes()
        evidence = b""
        if fresh:
            if identity.evidence is None:
                raise HandshakeRefused(
                    "the peer asks for fresh evidence, and this end has none", code="no_evidence"
                )
            evidence = identity.evidence(statement.nonce)
        shown = cbor.encode({"token": token, "keys": identity.keys.encode(), "sign": sign, "evidence": evidence})
        if len(shown) > MAX_SHOWN:
            raise UsageError(f"what is shown is at most {MAX_SHOWN} bytes, evidence included")
        key, purpose = identity.sign, Purpose.CHANNEL_PEER
    return cbor.encode({"shown": shown, "signature": key.sign(purpose, statement.encode(shown))})


def verify_holder(body: bytes, statement: Statement) -> HolderPeer:
    """Read a client's A1. Raises HandshakeRefused."""
    try:
        signed = cbor.record(body, _SIGNED, max_size=MAX_SHOWN + MAX_WRAPPING)
        holder = cbor.record(signed["shown"], {"holder": bytes}, max_size=MAX_SHOWN)["holder"]
    except MalformedError:
        raise HandshakeRefused("the peer shows no holder key", code="malformed") from None
    if not signing.verify(holder, Purpose.CHANNEL_HOLDER, statement.encode(signed["shown"]), signed["signature"]):
        raise HandshakeRefused("the peer does not hold the key that it shows", code="holder_refused")
    return HolderPeer(_MADE_HERE, holder)


def verify_attested(
    body: bytes, statement: Statement, expect: Expect, static: bytes, *, fresh: bool = True
) -> AttestedPeer:
    """Read an attested end's A1 or A2, in this order. Raises HandshakeRefused.

    1. The token is the issuer's, fresh, and not simulated unless that was opted into.
    2. The keys shown are the attested ones: their digest is the token's, the Noise static key and the signing key
       are among them.
    3. The signature covers this session, this role and what is shown.
    4. The slot, instance, lineage and sequence are the pinned ones.
    5. Where ``expect`` has a policy: evidence made for this session satisfies it, and is about the same keys. (Not
       for ``fresh=False``: a session that goes on renews its token only.)
    """
    try:
        signed = cbor.record(body, _SIGNED, max_size=MAX_SHOWN + MAX_WRAPPING)
        fields: dict[str, type] = {"token": str, "keys": bytes, "sign": bytes, "evidence": bytes}
        shown = cbor.record(signed["shown"], fields, max_size=MAX_SHOWN)
        result = _verified(shown["token"], expect)
        if hashlib.sha256(shown["keys"]).digest() != result.keys_digest:
            raise HandshakeRefused("the token is about other keys", code="key_not_attested")
        keys = KeyDigests.parse(shown["keys"])
        keys.check("channel", static)
        keys.check("sign", shown["sign"])
        key = VerifyingKey.from_bytes(shown["sign"])
    except (MalformedError, ResultRefused, EvidenceRefused, KeyFormatError) as error:
        raise HandshakeRefused(f"the peer's attestation is refused: {error.message}", code=error.code) from None
    if not key.verify(Purpose.CHANNEL_PEER, statement.encode(signed["shown"]), signed["signature"]):
        raise HandshakeRefused("the peer's signature is not over this session", code="signature_refused")
    check_pins(result, expect)
    if fresh and expect.policy is not None:
        _appraise(shown["evidence"], statement.nonce, result, expect, expect.policy)
    return AttestedPeer(_MADE_HERE, result, static, key)


def _appraise(evidence: bytes, nonce: bytes, result: AttestationResult, expect: Expect, policy: Policy) -> None:
    """Raise HandshakeRefused unless the evidence is fresh, about the token's keys, and admitted by the policy."""
    if not evidence:
        raise HandshakeRefused("the peer shows no fresh evidence", code="no_evidence")
    appraisal = appraise(evidence, policy=policy, nonce=nonce, at=expect.clock(), slot=result.slot)
    try:
        appraisal.require()
    except AppraisalRefused as error:
        raise HandshakeRefused(f"the peer's evidence is refused: {error.message}", code=error.code) from None
    envelope = appraisal.envelope
    if envelope is None or envelope.runtime.keys_digest != result.keys_digest:
        raise HandshakeRefused("the evidence is about other keys", code="key_not_attested")


def _verified(token: str, expect: Expect) -> AttestationResult:
    """The token's result. Its signature is checked once; when a peer connects again, only the time is."""
    now, insecure = expect.clock(), expect.INSECURE_accept_simulated
    known = (token, expect.issuer_key, insecure)
    result = _KNOWN.get(known)
    # Another time than it was verified for: what is at its end, or from the future, is verified again, and refused.
    if result is None or not result.issued <= now < result.expires:
        result = results.verify(token, issuer_key=expect.issuer_key, now=now, INSECURE_accept_simulated=insecure)
        if len(_KNOWN) >= MAX_KNOWN:
            _KNOWN.clear()
        _KNOWN[known] = result
    return result


def check_pins(result: AttestationResult, expect: Expect) -> None:
    """Raise HandshakeRefused unless the result is about the pinned place in the job (4.4)."""
    slot = result.slot
    if result.tier == "simulated" and not expect.INSECURE_accept_simulated:
        raise HandshakeRefused("the peer's platform is simulated", code="simulated_refused")
    if slot is None or slot.job != expect.job:
        raise HandshakeRefused("the peer has no slot in this job", code="wrong_job")
    if expect.rank is not None and slot.rank != expect.rank:
        raise HandshakeRefused("the peer has another rank", code="wrong_rank")
    if expect.instance is not None and result.instance != expect.instance:
        raise HandshakeRefused("the peer is another instance, maybe a twin of the same code", code="wrong_instance")
    if expect.lineage is not None and result.lineage != expect.lineage:
        raise HandshakeRefused("the peer was appraised under another policy", code="wrong_lineage")
    if result.sequence < expect.least_sequence:
        raise HandshakeRefused("the peer was appraised under an older policy", code="old_policy")
