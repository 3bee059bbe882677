"""A second end, written from docs/spec/channel.md and crypto.md alone: no protocol code of isolate runs in it.

It shakes hands with ours in both roles, both profiles and every suite, and then they talk. It is also the second
implementation of XXhfs with ML-KEM-768, for which there are no public vectors. What it needs to know is what the
specification must say.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
from typing import Any

import cbor2
import nacl.bindings
import pytest
from attrs import evolve
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from isolate.channel import Handshake, RekeyLimits
from isolate.channel.session import Endpoint, Inbox
from isolate.crypto.aead import Suite
from isolate.errors import ChannelClosed, HandshakeRefused

FIRST, SECOND, THIRD, SHOW, FIN, DATA, LONG, PART, REKEY, CLOSE, ATTEST = 1, 2, 3, 4, 15, 16, 17, 18, 19, 20, 21
PART_SIZE = 2**20


def sha(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


def mac(key: bytes, data: bytes) -> bytes:
    return hmac.new(key, data, "sha256").digest()


def cbor(value: Any) -> bytes:
    """Deterministic for maps with text keys: by length first is then bytewise (crypto.md, 1)."""
    return cbor2.dumps(value, canonical=True)


def derive(key: bytes, label: str, *context: Any) -> bytes:
    """crypto.md, 2."""
    return mac(mac(bytes(32), key), cbor([label, *context]) + b"\1")


def frame(kind: int, body: bytes, size: int | None = None) -> bytes:
    return struct.pack(">B3xI", kind, len(body) if size is None else size) + body


class Noise:
    """Section 3.1, for one handshake."""

    def __init__(self, suite: int, prologue: bytes) -> None:
        self.chacha = suite == 3
        name = b"Noise_XXhfs_25519+MLKEM768_" + (b"ChaChaPoly" if self.chacha else b"AESGCM") + b"_SHA256"
        self.h = self.ck = sha(name)
        self.key, self.number = b"", 0
        self.mix_hash(prologue)

    def mix_hash(self, data: bytes) -> None:
        self.h = sha(self.h, data)

    def mix_key(self, secret: bytes) -> None:
        self.ck, self.key = self.two(secret)
        self.number = 0

    def two(self, secret: bytes) -> tuple[bytes, bytes]:
        mixed = mac(self.ck, secret)
        first = mac(mixed, b"\1")
        return first, mac(mixed, first + b"\2")

    def crypt(self, key: bytes, number: int, text: bytes, data: bytes, *, seal: bool) -> bytes:
        aead: Any = (ChaCha20Poly1305 if self.chacha else AESGCM)(key)
        nonce = bytes(4) + number.to_bytes(8, "little" if self.chacha else "big")
        return bytes((aead.encrypt if seal else aead.decrypt)(nonce, text, data))

    def write(self, text: bytes) -> bytes:
        sealed = text
        if self.key:
            sealed = self.crypt(self.key, self.number, text, self.h, seal=True)
            self.number += 1
        self.mix_hash(sealed)
        return sealed

    def read(self, sealed: bytes) -> bytes:
        text = sealed
        if self.key:
            text = self.crypt(self.key, self.number, sealed, self.h, seal=False)
            self.number += 1
        self.mix_hash(sealed)
        return text


class Records:
    """Section 5, one direction."""

    def __init__(self, suite: int, key: bytes) -> None:
        self.suite, self.key, self.number, self.epoch = suite, key, 0, 0
        self.tag = 32 if suite == 1 else 16

    def crypt(self, text: bytes, header: bytes, *, seal: bool) -> bytes:
        nonce = self.number.to_bytes(32 if self.suite == 1 else 12, "big")
        self.number += 1
        if self.suite == 1:
            name = f"crypto_aead_aegis256_{'encrypt' if seal else 'decrypt'}"
            return bytes(getattr(nacl.bindings, name)(text, header, nonce, self.key))
        aead: Any = (AESGCM if self.suite == 2 else ChaCha20Poly1305)(self.key)
        return bytes((aead.encrypt if seal else aead.decrypt)(nonce, text, header))

    def seal(self, kind: int, text: bytes = b"") -> bytes:
        header = frame(kind, b"", len(text))
        record = header + self.crypt(text, header, seal=True)
        self.rekey(kind)
        return record

    def open(self, data: bytes) -> tuple[int, bytes, bytes]:
        """Kind, plaintext, and what follows the record."""
        kind, size = struct.unpack(">B3xI", data[:8])
        end = 8 + size + self.tag
        text = self.crypt(data[8:end], data[:8], seal=False)
        self.rekey(kind)
        return kind, text, data[end:]

    def rekey(self, kind: int) -> None:
        if kind == REKEY:
            self.epoch += 1
            self.key = derive(self.key, "isolate/v1/channel/rekey", self.epoch)


class SecondEnd:
    """Sections 3 and 4. Of ``identity``, one of ours, it takes the token and the private keys; None is a client."""

    def __init__(self, *, initiator: bool, profile: int, suite: int, purpose: str, identity: Any) -> None:
        self.initiator, self.profile, self.suite, self.purpose = initiator, profile, suite, purpose
        self.identity = identity
        self.curve = X25519PrivateKey.generate()
        self.signing = Ed25519PrivateKey.generate()
        self.sign = self.signing.sign
        if identity is not None:
            self.curve = X25519PrivateKey.from_private_bytes(identity.static.expose())
            self.sign = identity.sign._sign  # bare: the frame is made here
        self.static = self.curve.public_key().public_bytes_raw()
        self.ephemeral = X25519PrivateKey.generate()
        self.lattice = MLKEM768PrivateKey.generate()
        self.fresh = False  # whether it asks for fresh evidence

    def dh(self, key: X25519PrivateKey, public: bytes) -> None:
        self.noise.mix_key(key.exchange(X25519PublicKey.from_public_bytes(public)))

    def begin(self, hello: bytes) -> None:
        self.noise = Noise(
            self.suite, cbor({"protocol": "isolate/channel/v1", "hello": hello, "purpose": self.purpose})
        )

    # The initiator.

    def first(self) -> bytes:
        self.terms = cbor(
            {
                "salt": os.urandom(32), "job": "job", "group": "", "rank": 1, "lineage": "acme/train",
                "least_sequence": 0, "fresh": self.fresh,
            }
        )  # fmt: skip
        commitment = sha(b"isolate/v1/channel/terms\0", self.terms)
        hello = b"ISOC" + bytes([1, self.profile, self.suite, 0]) + commitment
        self.begin(hello)
        ephemeral = self.ephemeral.public_key().public_bytes_raw()
        self.noise.mix_hash(ephemeral)
        lattice = self.noise.write(self.lattice.public_key().public_bytes_raw())
        return frame(FIRST, hello + ephemeral + lattice + self.noise.write(b""))

    def third(self, body: bytes) -> bytes:
        self.theirs = body[:32]
        self.noise.mix_hash(self.theirs)
        self.dh(self.ephemeral, self.theirs)
        boxed = self.noise.read(body[32 : 32 + 1088 + 16])
        self.noise.mix_key(self.lattice.decapsulate(boxed))
        self.remote = self.noise.read(body[1136:1184])
        self.dh(self.ephemeral, self.remote)
        assert cbor2.loads(self.noise.read(body[1184:])) == {"fresh": False}
        sealed = self.noise.write(self.static)
        self.dh(self.curve, self.theirs)
        third = frame(THIRD, sealed + self.noise.write(self.terms))
        self.split()
        self.shown_first = self.show("initiator", b"")
        return third + frame(SHOW, self.noise.crypt(self.forth, 0, self.shown_first, b"", seal=True))

    def last(self, shown: bytes, fin: bytes) -> bytes:
        second = self.noise.crypt(self.back, 0, shown, b"", seal=False)
        self.peer = self.verify("responder", sha(self.shown_first), second)
        self.keys(second)
        assert self.incoming.open(frame(FIN, b"") + fin) == (FIN, b"", b"")
        return self.outgoing.seal(FIN)

    # The responder.

    def second(self, body: bytes) -> bytes:
        hello, rest = body[:40], body[40:]
        assert hello[:8] == b"ISOC" + bytes([1, self.profile, self.suite, 0])
        self.commitment = hello[8:]
        self.begin(hello)
        self.theirs = rest[:32]
        self.noise.mix_hash(self.theirs)
        lattice = MLKEM768PublicKey.from_public_bytes(self.noise.read(rest[32 : 32 + 1184]))
        assert self.noise.read(rest[1216:]) == b""
        ephemeral = self.ephemeral.public_key().public_bytes_raw()
        self.noise.mix_hash(ephemeral)
        self.dh(self.ephemeral, self.theirs)
        secret, boxed = lattice.encapsulate()
        sealed = self.noise.write(boxed)
        self.noise.mix_key(secret)
        static = self.noise.write(self.static)
        self.dh(self.curve, self.theirs)
        return frame(SECOND, ephemeral + sealed + static + self.noise.write(cbor({"fresh": self.fresh})))

    def take_third(self, body: bytes) -> None:
        self.remote = self.noise.read(body[:48])
        self.dh(self.ephemeral, self.remote)
        raw = self.noise.read(body[48:])
        assert sha(b"isolate/v1/channel/terms\0", raw) == self.commitment
        terms = cbor2.loads(raw)
        assert len(terms.pop("salt")) == 32
        assert terms == {
            "job": "job", "group": "", "rank": 1, "lineage": "acme/train", "least_sequence": 0, "fresh": False,
        }  # fmt: skip
        self.split()

    def answer(self, shown: bytes) -> bytes:
        self.shown_first = self.noise.crypt(self.forth, 0, shown, b"", seal=False)
        self.peer = self.verify("initiator", b"", self.shown_first)
        second = self.show("responder", sha(self.shown_first))
        sealed = self.noise.crypt(self.back, 0, second, b"", seal=True)
        self.keys(second)
        return frame(SHOW, sealed) + self.outgoing.seal(FIN)

    # Both.

    def split(self) -> None:
        self.forth, self.back = self.noise.two(b"")
        label = "isolate/v1/channel/exporter"
        self.exported = derive(self.noise.ck, label, "attestation", self.noise.h)

    def statement(self, role: str, before: bytes, shown: bytes | None) -> bytes:
        ends = (self.static, self.remote) if self.initiator else (self.remote, self.static)
        fields = {
            "role": role, "hash": self.noise.h, "exported": self.exported, "initiator": ends[0],
            "responder": ends[1], "before": before,
        }  # fmt: skip
        return cbor(fields if shown is None else {**fields, "shown": sha(shown)})

    def nonce(self, role: str, before: bytes) -> bytes:
        return sha(b"isolate/v1/channel/evidence\0", self.statement(role, before, None))

    def show(self, role: str, before: bytes) -> bytes:
        purpose = b"channel/holder" if self.identity is None else b"channel/peer"
        if self.identity is None:
            shown = cbor({"holder": self.signing.public_key().public_bytes_raw()})
        else:
            keys = cbor(dict(self.identity.keys.digests))
            sign = self.identity.sign.verifying_key.to_bytes()
            shown = cbor({"token": self.identity.token, "keys": keys, "sign": sign, "evidence": b""})
        message = b"isolate/v1/" + purpose + b"\0" + self.statement(role, before, shown)
        return cbor({"shown": shown, "signature": self.sign(message)})

    def verify(self, role: str, before: bytes, body: bytes) -> dict[str, Any]:
        signed = cbor2.loads(body)
        shown: dict[str, Any] = cbor2.loads(signed["shown"])
        message = self.statement(role, before, signed["shown"])
        if "holder" in shown:
            key, purpose = shown["holder"], b"channel/holder"
        else:
            key, purpose = shown["sign"][:32], b"channel/peer"
            digests = cbor2.loads(shown["keys"])
            assert (digests["channel"], digests["sign"]) == (sha(self.remote), sha(shown["sign"]))
        framed = b"isolate/v1/" + purpose + b"\0" + message
        Ed25519PublicKey.from_public_bytes(key).verify(signed["signature"], framed)
        return shown

    def keys(self, shown_second: bytes) -> None:
        ck, total = self.noise.ck, sha(self.noise.h, sha(self.shown_first), sha(shown_second))
        label = "isolate/v1/channel/application"
        forth, back = (derive(ck, label, role, self.suite, total) for role in ("initiator", "responder"))
        ours, theirs = (forth, back) if self.initiator else (back, forth)
        self.outgoing, self.incoming = Records(self.suite, ours), Records(self.suite, theirs)
        self.binding = derive(ck, "isolate/v1/channel/exporter", "binding", total)


def frames(core: Handshake, data: bytes) -> list[bytes]:
    """The bodies of what ours sent."""
    bodies = []
    while data:
        event, size = core.parse(data[:8])
        end = 8 + core.body_size(event, size)
        bodies.append(data[8:end])
        data = data[end:]
    return bodies


def step(core: Handshake, data: bytes) -> bytes:
    """Give ours every frame in ``data``; what it answers."""
    answer = b""
    while data:
        event, size = core.parse(data[:8])
        end = 8 + core.body_size(event, size)
        answer += core.step(event, data[8:end])
        data = data[end:]
    return answer


def shake(core: Handshake, second: SecondEnd) -> None:
    if second.initiator:
        (body,) = frames(core, step(core, second.first()))
        shown, fin = frames(core, step(core, second.third(body)))
        assert step(core, second.last(shown, fin)) == b""
    else:
        (body,) = frames(core, core.start())
        third, shown = frames(core, step(core, second.second(body)))
        second.take_third(third)
        fin = step(core, second.answer(shown))
        assert second.incoming.open(fin) == (FIN, b"", b"")
    assert core.done


def ends(world: Any, *, initiator: bool, profile: str, suite: Suite, **options: Any) -> tuple[Handshake, SecondEnd]:
    """Ours, and the second end, whose part is ``initiator`` (rank 0) or not (rank 1)."""
    client = profile == "client"
    if client and not initiator:
        ours, _ = world.client_pair(suites=[suite], purpose="p", **options)
    elif client:
        _, ours = world.client_pair(suites=[suite], purpose="p", **options)
    else:
        one, other = world.pair(suites=[suite], purpose="p", **options)
        ours = other if initiator else one
    identity = None if client and initiator else world.attested(0 if initiator else 1)
    second = SecondEnd(
        initiator=initiator, profile=2 if client else 1, suite=int(suite), purpose="p", identity=identity
    )
    return ours, second


class Reader:
    """Hands bytes to an endpoint of ours and reads one message."""

    def __init__(self, core: Handshake) -> None:
        self.inbox = Inbox()
        self.end = Endpoint(core.session, self.inbox)

    def take(self, data: bytes) -> bytes:
        while need := self.end.pull(None):
            assert data, "it waits for more"
            space = self.inbox.space(need)
            count = min(len(space), len(data))
            space[:count] = data[:count]
            self.inbox.added(count)
            data = data[count:]
        assert not data and not isinstance(self.end.message, int)
        return bytes(self.end.message)


@pytest.mark.parametrize("suite", list(Suite))
@pytest.mark.parametrize("profile", ["peer", "client"])
@pytest.mark.parametrize("initiator", [True, False], ids=["it begins", "we begin"])
def test_a_second_implementation_talks_with_ours(world: Any, suite: Suite, profile: str, initiator: bool) -> None:
    core, second = ends(world, initiator=initiator, profile=profile, suite=suite, rekey=RekeyLimits(records=3))
    shake(core, second)
    assert second.binding == core.session.binding
    reader = Reader(core)
    if profile == "client" and initiator:
        assert reader.end.peer.public == second.signing.public_key().public_bytes_raw()
    elif profile == "client":
        assert second.peer["holder"] == core._identity.key.verifying_key.ed25519
    # What ours sends, with a REKEY before every third record.
    for size in (0, 1, 70_000, PART_SIZE, 2 * PART_SIZE + 7):
        data = os.urandom(size)
        stream = b"".join(bytes(record) for record in reader.end.outgoing(memoryview(data)))
        got, length = b"", None
        while stream:
            kind, text, stream = second.incoming.open(stream)
            if kind == LONG:
                length = int.from_bytes(text, "big")
            elif kind != REKEY:
                assert kind == (DATA if length is None else PART)
                got += text
        assert got == data and length in (None, size)
    assert second.incoming.epoch >= 2
    # What it sends.
    out = second.outgoing
    assert reader.take(out.seal(DATA, b"hello")) == b"hello"
    data = os.urandom(PART_SIZE + 1)
    stream = out.seal(REKEY) + out.seal(LONG, len(data).to_bytes(8, "big"))
    stream += out.seal(PART, data[:PART_SIZE]) + out.seal(REKEY) + out.seal(PART, data[PART_SIZE:])
    assert reader.take(stream) == data and reader.end._opener.epoch == 2
    assert second.incoming.open(bytes(reader.end.closing("revoked"))) == (CLOSE, b"revoked", b"")
    with pytest.raises(ChannelClosed, match="over_here"):
        reader.take(out.seal(CLOSE, b"over_here"))


@pytest.mark.parametrize("initiator", [True, False], ids=["it begins", "we begin"])
def test_a_second_implementation_renews_and_asks_for_evidence(world: Any, initiator: bool) -> None:
    """ATTEST in both directions (section 7), and the nonce of fresh evidence (4.3)."""
    core, second = ends(world, initiator=initiator, profile="peer", suite=Suite.AEGIS_256)
    asked: list[bytes] = []
    core._identity = evolve(core._identity, evidence=lambda nonce: asked.append(nonce) or b"evidence")
    second.fresh = True
    shake(core, second)
    ours, theirs = ("responder", "initiator") if initiator else ("initiator", "responder")
    assert asked == [second.nonce(ours, sha(second.shown_first) if initiator else b"")]
    assert second.peer["evidence"] == b"evidence"
    assert second.peer["token"] == core._identity.token
    reader = Reader(core)

    def before(number: int) -> bytes:
        return sha(b"isolate/v1/channel/again\0", number.to_bytes(8, "big"))

    old = reader.end.peer
    attest = second.outgoing.seal(ATTEST, second.show(theirs, before(second.outgoing.number)))
    assert reader.take(attest + second.outgoing.seal(DATA, b"x")) == b"x" and reader.end.peer is not old
    number = second.incoming.number
    kind, text, _ = second.incoming.open(bytes(reader.end.attesting(now=True) or b""))
    assert kind == ATTEST and second.verify(ours, before(number), text)["evidence"] == b""
    # Signed for another record than it comes in.
    wrong = second.show(theirs, before(second.outgoing.number + 1))
    with pytest.raises(HandshakeRefused):
        reader.take(second.outgoing.seal(ATTEST, wrong))
