"""The handshake without I/O: frames in, frames out, and at the end a Session that only this module makes.

One table holds every step (docs/spec/channel.md, 3 and 4). The initiator sends FIRST, THIRD with SHOW, and FIN;
the responder SECOND, then SHOW with FIN. Noise XXhfs comes first; then each side shows its attestation (or a
holder key), signed over the handshake hash and an exported secret; FIN is the first record under the application
keys, which depend on all that was shown. There is no application byte before the FIN of the other side.

    >>> from isolate.channel.handshake import TABLE, Event, State
    >>> TABLE[State.WAIT_FIRST, Event.FIRST][0]
    <State.WAIT_THIRD: 'wait third'>

Whatever is unexpected or refused raises HandshakeRefused and ends this handshake for good: ``refusal(error)`` is
the frame that tells the peer a code and nothing else.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Callable, Collection
from enum import Enum, IntEnum
from typing import Final

from attrs import asdict, frozen

from isolate.channel.noise import CipherState, HandshakeState
from isolate.channel.peers import (
    Attested,
    AttestedPeer,
    Expect,
    Holder,
    HolderPeer,
    Statement,
    show,
    verify_attested,
    verify_holder,
)
from isolate.channel.record import HEADER, HEADER_SIZE, Kind, Opener, RekeyLimits, Sealer
from isolate.channel.standing import Standing
from isolate.crypto import cbor
from isolate.crypto.aead import Pin, Suite, fastest_suite
from isolate.crypto.exchange import CurveKey
from isolate.crypto.kdf import Label, derive
from isolate.errors import HandshakeRefused, IsolateError, MalformedError, RecordRefused, UsageError

MAGIC = b"ISOC"
VERSION = 1
PROFILES = {"peer": 1, "client": 2}
HELLO_SIZE = 40  # magic, version, profile, suite, zero, commitment
MAX_FRAME = 65535 + HELLO_SIZE  # bytes of one handshake frame's body
MAX_PURPOSE = 128

_NOISE = {
    Suite.AEGIS_256: "Noise_XXhfs_25519+MLKEM768_AESGCM_SHA256",
    Suite.AES_256_GCM: "Noise_XXhfs_25519+MLKEM768_AESGCM_SHA256",
    Suite.CHACHA20_POLY1305: "Noise_XXhfs_25519+MLKEM768_ChaChaPoly_SHA256",
}
_MADE_HERE: Final = object()


class Event(IntEnum):
    """The kind of a handshake frame, its first byte. START is no frame: the initiator's own first step."""

    START = 0
    FIRST = 1
    SECOND = 2
    THIRD = 3
    SHOW = 4
    REFUSE = 6
    FIN = Kind.FIN


_FRAMES = frozenset(Event) - {Event.START}


class State(Enum):
    IDLE = "idle"
    WAIT_FIRST = "wait first"
    WAIT_SECOND = "wait second"
    WAIT_THIRD = "wait third"
    WAIT_SHOW_I = "wait for what the initiator shows"
    WAIT_SHOW_R = "wait for what the responder shows"
    WAIT_FIN_I = "wait for the initiator's fin"
    WAIT_FIN_R = "wait for the responder's fin"
    DONE = "done"
    ENDED = "ended"


# Every step there is. REFUSE ends any of these states; whatever else is not here is refused.
TABLE: dict[tuple[State, Event], tuple[State, str]] = {
    (State.IDLE, Event.START): (State.WAIT_SECOND, "_start"),
    (State.WAIT_SECOND, Event.SECOND): (State.WAIT_SHOW_R, "_second"),
    (State.WAIT_SHOW_R, Event.SHOW): (State.WAIT_FIN_R, "_show_of_responder"),
    (State.WAIT_FIN_R, Event.FIN): (State.DONE, "_fin_of_responder"),
    (State.WAIT_FIRST, Event.FIRST): (State.WAIT_THIRD, "_first"),
    (State.WAIT_THIRD, Event.THIRD): (State.WAIT_SHOW_I, "_third"),
    (State.WAIT_SHOW_I, Event.SHOW): (State.WAIT_FIN_I, "_show_of_initiator"),
    (State.WAIT_FIN_I, Event.FIN): (State.DONE, "_fin_of_initiator"),
}


class Session:
    """What a finished handshake leaves: the peer, the keys of both directions, and ``binding`` (32 bytes)."""

    __slots__ = ("binding", "opener", "sealer", "standing", "suite")

    def __init__(
        self, made: object, standing: Standing, suite: Suite, sealer: Sealer, opener: Opener, binding: bytes
    ) -> None:
        if made is not _MADE_HERE:
            raise UsageError("only a handshake makes a Session")
        self.standing, self.suite, self.sealer, self.opener, self.binding = standing, suite, sealer, opener, binding

    @property
    def peer(self) -> AttestedPeer | HolderPeer:
        return self.standing.peer


@frozen
class Terms:
    """What the initiator asks for. Its digest goes into the prologue, the terms themselves under encryption."""

    salt: bytes
    job: str
    group: str
    rank: int | None
    lineage: str | None
    least_sequence: int
    fresh: bool

    def encode(self) -> bytes:
        return cbor.encode(asdict(self))

    @classmethod
    def parse(cls, data: bytes) -> Terms:
        """Raises MalformedError."""
        shapes: dict[str, type] = {"salt": bytes, "job": str, "group": str, "least_sequence": int, "fresh": bool}
        value = cbor.record(data, {**shapes, "rank": object, "lineage": object}, max_size=4096)
        rank, lineage = type(value["rank"]), type(value["lineage"])
        if len(value["salt"]) != 32 or rank not in (int, type(None)) or lineage not in (str, type(None)):
            raise MalformedError("the terms of the handshake have another form")
        return cls(**value)


def _commitment(terms: bytes) -> bytes:
    return hashlib.sha256(b"isolate/v1/channel/terms\0" + terms).digest()


def frame(event: Event, body: bytes) -> bytes:
    return HEADER.pack(event, 0, 0, len(body)) + body


def refusal(error: IsolateError) -> bytes:
    """The frame that tells the peer the error's code, and nothing else."""
    return frame(Event.REFUSE, error.code.encode("ascii", "replace")[:64])


class Handshake:
    """One side of one handshake.

    ``profile`` is "peer" (both ends attested) or "client" (the responder attested, the initiator a Holder).
    ``expect`` is None only for the responder of the client profile. ``suites`` are those that a responder takes;
    an initiator asks for the first. ``ephemeral`` and ``salt`` are for tests.
    Raises UsageError when identity, profile and pins do not fit together.
    """

    def __init__(
        self,
        *,
        initiator: bool,
        identity: Attested | Holder,
        expect: Expect | None,
        profile: str = "peer",
        purpose: str = "",
        suites: Collection[Suite] = (),
        rekey: RekeyLimits | None = None,
        ephemeral: CurveKey | None = None,
        salt: bytes | None = None,
    ) -> None:
        if profile not in PROFILES or len(purpose.encode()) > MAX_PURPOSE:
            raise UsageError(f"a profile is 'peer' or 'client', a purpose at most {MAX_PURPOSE} bytes")
        shows_holder = isinstance(identity, Holder)
        if shows_holder != (initiator and profile == "client"):
            raise UsageError("a Holder connects with the profile 'client'; every other end is Attested")
        if expect is None and (initiator or profile == "peer"):
            raise UsageError("this end needs expect=: what the other end must be")
        self._identity, self._expect, self._profile, self._purpose = identity, expect, profile, purpose
        self._static = CurveKey.generate() if isinstance(identity, Holder) else identity.curve
        self.initiator = initiator
        self._suites = tuple(suites) or (fastest_suite(), *Suite)
        self._rekey = rekey
        # A responder has its key before anybody connects; an initiator makes its own while it is being accepted.
        self._ephemeral = CurveKey.generate() if ephemeral is None and not initiator else ephemeral
        self._salt = secrets.token_bytes(32) if salt is None else salt
        self.state = State.IDLE if initiator else State.WAIT_FIRST
        self._process = os.getpid()
        self._session: Session | None = None

    @property
    def session(self) -> Session:
        """What the handshake was for. Raises UsageError before it is done."""
        if self.state is not State.DONE or self._session is None:
            raise UsageError("the handshake is not done")
        return self._session

    @property
    def done(self) -> bool:
        return self.state is State.DONE

    @staticmethod
    def parse(header: bytes) -> tuple[Event, int]:
        """The kind of a frame and the size of its body. Raises HandshakeRefused."""
        number, flags, reserved, size = HEADER.unpack(header)
        if flags or reserved or size > MAX_FRAME or number not in _FRAMES:
            raise HandshakeRefused("this is no frame of a channel's handshake", code="malformed")
        # FIN is a record: its header gives the bytes of plaintext, the tag comes behind them.
        return Event(number), size

    def body_size(self, event: Event, size: int) -> int:
        """The bytes that follow the header: a FIN has a tag behind its (empty) plaintext."""
        return size + self._suite.tag_size if event is Event.FIN and self._session else size

    def start(self) -> bytes:
        """The initiator's first frame."""
        return self.step(Event.START, b"")

    def step(self, event: Event, body: bytes, send: Callable[[bytes], object] | None = None) -> bytes:
        """Take one frame; answer what must be sent, which may be nothing. Raises HandshakeRefused.

        ``send`` is called with a part that is ready before the rest, so that the peer works on it meanwhile.
        """
        if event is Event.REFUSE and self.state not in (State.DONE, State.ENDED):
            self.state = State.ENDED
            code = body.decode("ascii", "replace")
            known = re.fullmatch(r"[a-z_]{1,64}", code)
            raise HandshakeRefused(f"the peer refused: {code if known else 'no reason'}", code="peer_refused")
        if os.getpid() != self._process:
            self.state = State.ENDED
            raise HandshakeRefused("the process forked during the handshake", code="forked")
        row = TABLE.get((self.state, event))
        before, self.state = self.state, State.ENDED
        self._send = send
        if row is None:
            raise HandshakeRefused(f"unexpected in this state ({before.value}): {event.name}", code="out_of_order")
        try:
            answer: bytes = getattr(self, row[1])(body)
        except HandshakeRefused:
            raise
        except (MalformedError, RecordRefused) as error:
            raise HandshakeRefused(error.message, code=error.code) from None
        self.state = row[0]
        return answer

    # The initiator's steps.

    def _start(self, _: bytes) -> bytes:
        expect = self._need_expect()
        self._terms = Terms(
            self._salt,
            expect.job,
            expect.group,
            expect.rank,
            expect.lineage,
            expect.least_sequence,
            expect.policy is not None,
        ).encode()
        self._suite = self._suites[0]
        head = bytes([VERSION, PROFILES[self._profile], self._suite, 0])
        hello = MAGIC + head + _commitment(self._terms)
        self._begin_noise(hello)
        return frame(Event.FIRST, hello + self._noise.write_message())

    def _second(self, body: bytes) -> bytes:
        asked = cbor.record(self._noise.read_message(body), {"fresh": bool}, max_size=64)
        if self._noise.remote_static == self._static.public:
            raise HandshakeRefused("these are our own keys: the messages come back to us", code="reflected")
        third = self._early(frame(Event.THIRD, self._noise.write_message(self._terms)))
        self._finish_noise()
        self._shown_first = self._show(self._statement("initiator", b""), fresh=asked["fresh"])
        return third + frame(Event.SHOW, self._outgoing.encrypt(b"", self._shown_first))

    def _show_of_responder(self, body: bytes) -> bytes:
        shown = self._incoming.decrypt(b"", body)
        before = hashlib.sha256(self._shown_first).digest()
        static = self._noise.remote_static or b""
        peer = verify_attested(shown, self._statement("responder", before), self._need_expect(), static)
        self._make_session(peer, shown)
        return b""

    def _fin_of_responder(self, body: bytes) -> bytes:
        self._take_fin(body)
        return self._fin()

    # The responder's steps.

    def _first(self, body: bytes) -> bytes:
        hello = body[:HELLO_SIZE]
        if len(hello) < HELLO_SIZE or hello[:4] != MAGIC or hello[7]:
            raise HandshakeRefused("the peer does not speak this protocol", code="malformed")
        if hello[4] != VERSION:
            raise HandshakeRefused("the peer speaks another version", code="wrong_version")
        if hello[5] != PROFILES[self._profile]:
            raise HandshakeRefused(f"this end speaks the profile {self._profile!r} only", code="wrong_profile")
        if hello[6] not in self._suites:
            raise HandshakeRefused("the peer asks for a suite that this end does not take", code="wrong_suite")
        self._suite = Suite(hello[6])
        self._begin_noise(hello)
        self._commitment = hello[8:]
        if self._noise.read_message(body[HELLO_SIZE:]):
            raise HandshakeRefused("the first message has no payload", code="malformed")
        fresh = self._expect is not None and self._expect.policy is not None
        return frame(Event.SECOND, self._noise.write_message(cbor.encode({"fresh": fresh})))

    def _third(self, body: bytes) -> bytes:
        raw = self._noise.read_message(body)
        terms = Terms.parse(raw)
        if _commitment(raw) != self._commitment:
            raise HandshakeRefused("the peer's terms are not those of its prologue", code="wrong_terms")
        if self._noise.remote_static == self._static.public:
            raise HandshakeRefused("these are our own keys: the messages come back to us", code="reflected")
        if self._profile == "peer":
            expect = self._need_expect()
            if (terms.job, terms.group, terms.lineage) != (expect.job, expect.group, expect.lineage):
                raise HandshakeRefused("the peer wants another job, group or policy", code="wrong_terms")
        self._asked_fresh = terms.fresh
        self._finish_noise()
        return b""

    def _show_of_initiator(self, body: bytes) -> bytes:
        shown = self._incoming.decrypt(b"", body)
        statement = self._statement("initiator", b"")
        peer: AttestedPeer | HolderPeer
        if self._profile == "client":
            peer = verify_holder(shown, statement)
        else:
            static = self._noise.remote_static or b""
            peer = verify_attested(shown, statement, self._need_expect(), static)
        self._shown_first = shown
        before = hashlib.sha256(shown).digest()
        answer = self._show(self._statement("responder", before), fresh=self._asked_fresh)
        sealed = self._early(frame(Event.SHOW, self._outgoing.encrypt(b"", answer)))
        self._make_session(peer, answer)
        return sealed + self._fin()

    def _fin_of_initiator(self, body: bytes) -> bytes:
        self._take_fin(body)
        return b""

    # What both sides do alike.

    def _early(self, ready: bytes) -> bytes:
        """Send this part now if that can be done; answers what is still to be sent of it."""
        if self._send is None:
            return ready
        self._send(ready)
        return b""

    def _show(self, statement: Statement, *, fresh: bool) -> bytes:
        # Asked for before it is shown: were it renewed between the two, the newer one would be shown once more.
        self._token = self._identity.current() if isinstance(self._identity, Attested) else ""
        return show(self._identity, statement, fresh=fresh)

    def _begin_noise(self, hello: bytes) -> None:
        prologue = cbor.encode({"protocol": "isolate/channel/v1", "hello": hello, "purpose": self._purpose})
        self._noise = HandshakeState(
            _NOISE[self._suite],
            initiator=self.initiator,
            prologue=prologue,
            static=self._static,
            ephemeral=self._ephemeral,
        )

    def _finish_noise(self) -> None:
        first, second = self._noise.split()
        self._outgoing: CipherState = first if self.initiator else second
        self._incoming: CipherState = second if self.initiator else first
        self._secret = self._noise.chaining_key()
        with derive(self._secret, Label.CHANNEL_EXPORTER, "attestation", self._noise.hash) as exported:
            self._exported = bytes(exported.expose())

    def _statement(self, role: str, before: bytes) -> Statement:
        ours, theirs = self._static.public, self._noise.remote_static or b""
        initiator, responder = (ours, theirs) if self.initiator else (theirs, ours)
        return Statement(role, self._noise.hash, self._exported, initiator, responder, before)

    def _make_session(self, peer: AttestedPeer | HolderPeer, shown_second: bytes) -> None:
        """Application keys depend on the handshake hash and on all that was shown (spec, 4.5)."""
        digests = [hashlib.sha256(shown).digest() for shown in (self._shown_first, shown_second)]
        transcript = hashlib.sha256(b"".join([self._noise.hash, *digests])).digest()
        label, suite = Label.CHANNEL_APPLICATION, self._suite
        forth = derive(self._secret, label, "initiator", int(suite), transcript)
        back = derive(self._secret, label, "responder", int(suite), transcript)
        with derive(self._secret, Label.CHANNEL_EXPORTER, "binding", transcript) as exported:
            binding = bytes(exported.expose())
        ours, theirs = (forth, back) if self.initiator else (back, forth)
        sealer, opener = Sealer(suite, ours, self._rekey), Opener(suite, theirs)
        role = "initiator" if self.initiator else "responder"
        standing = Standing(
            peer,
            identity=self._identity,
            expect=self._expect,
            statement=self._statement(role, b""),
            shown=self._token,
        )
        self._session = Session(_MADE_HERE, standing, suite, sealer, opener, binding)
        # From here on there are the keys of the records, and no others.
        for done in (forth, back, self._secret, self._noise, self._outgoing, self._incoming):
            done.wipe()
        self._ephemeral = None

    def _fin(self) -> bytes:
        session = self._need_session()
        return bytes(session.sealer.seal(Kind.FIN))

    def _take_fin(self, body: bytes) -> None:
        session = self._need_session()
        if len(body) != session.suite.tag_size:
            raise HandshakeRefused("a FIN is empty", code="malformed")
        pin = Pin(HEADER_SIZE + len(body))
        pin.view[:] = HEADER.pack(Kind.FIN, 0, 0, 0) + body
        session.opener.open(pin, 0, Kind.FIN, memoryview(bytearray()))

    def _need_session(self) -> Session:
        if self._session is None:
            raise UsageError("the handshake has no keys yet")
        return self._session

    def _need_expect(self) -> Expect:
        if self._expect is None:
            raise UsageError("this end needs expect=")
        return self._expect
