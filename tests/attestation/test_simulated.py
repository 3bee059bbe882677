"""The verifier of simulated evidence: each numbered check refuses on its own."""

from __future__ import annotations

from typing import Any

import pytest

from isolate.attestation.verifiers.cose import signed_bytes
from isolate.attestation.verifiers.simulated import PROTECTED, verify
from isolate.crypto import cbor, x509
from isolate.errors import EvidenceRefused
from isolate.launch.root import SimulatedRoot

NOW = 1_780_000_000


def refused(world: Any, evidence: bytes, **changes: Any) -> str:
    with pytest.raises(EvidenceRefused) as error:
        verify(evidence, **({"at": NOW, "anchors": [world.root.fingerprint]} | changes))
    return error.value.code


class Forge:
    """A holder of a leaf key who can sign anything: for faults behind the signature."""

    def __init__(self, world: Any) -> None:
        self.key = x509.P384Key.generate()
        self.root = world.root
        self.leaf = world.root._key.issue(
            world.root.certificate, "m", self.key, not_before=NOW - 60, not_after=NOW + 60
        )
        self.fields = cbor.decode(cbor.decode(world.document())[2]) | {"certificate": self.leaf}

    def document(self, protected: bytes = PROTECTED, **changes: Any) -> bytes:
        payload = cbor.encode(self.fields | changes)
        return cbor.encode([protected, {}, payload, self.key.sign(signed_bytes(protected, payload))])


@pytest.fixture
def forge(world: Any) -> Forge:
    return Forge(world)


def test_an_authentic_document(world: Any, forge: Forge) -> None:
    for document in (world.document(), forge.document()):
        claims = verify(document, at=NOW, anchors=[world.root.fingerprint])
        assert (claims.tier, claims.kind, claims.timestamp) == ("simulated", "simulated", NOW)
        assert claims.binding == world.runtime.binding() and claims.platform == world.root.fingerprint
        assert sorted(claims.measurements) == ["PCR0", "PCR1", "PCR2"] and not claims.debug


def test_1_form(world: Any) -> None:
    parts = cbor.decode(world.document())
    for odd in ([*parts, 0], parts[:3], [*parts[:1], {1: 2}, *parts[2:]], {"a": 1}, [parts[0], {}, parts[2], "x"]):
        assert refused(world, cbor.encode(odd)) == "evidence_form"
    for odd in (world.document() + b"\0", world.document()[:-1], b"\xd2" + world.document(), b"\0"):
        assert refused(world, odd) == "evidence_form"


def test_2_header_of_another_kind(world: Any, forge: Forge) -> None:
    nitro = cbor.encode({1: -35})
    es256 = cbor.encode({**cbor.decode(PROTECTED), 1: -7})
    for header in (nitro, es256, b""):
        assert refused(world, forge.document(header)) == "evidence_header"


@pytest.mark.parametrize(
    "change",
    [
        {"pcrs": {0: b"\1" * 48, 1: b"\1" * 48}}, {"pcrs": {0: b"\1" * 48, 1: b"\1" * 48, 2: b"\1" * 32}},
        {"digest": "SHA256"}, {"tier": "hardware"}, {"timestamp": -1}, {"user_data": b"x" * 1025},
        {"nonce": b"x" * 1025}, {"cabundle": []}, {"cabundle": [1]},
    ],
)  # fmt: skip
def test_3_fields(world: Any, forge: Forge, change: dict[str, Any]) -> None:
    assert refused(world, forge.document(**change)) == "evidence_fields"


def test_3_unknown_or_missing_field(world: Any, forge: Forge) -> None:
    assert refused(world, forge.document(extra=1)) == "evidence_malformed"
    del forge.fields["debug"]
    assert refused(world, forge.document()) == "evidence_malformed"


@pytest.mark.threat("ATT-3")
def test_4_a_root_that_the_evidence_brings_is_no_anchor(world: Any) -> None:
    """Whoever makes a root of its own can claim the good measurement; nobody is to believe it."""
    other = SimulatedRoot.generate(clock=lambda: NOW)
    document = other.module("m").document({0: b"\x0a" * 48, 1: b"\x0b" * 48, 2: b"\x0c" * 48}, b"", b"")
    assert refused(world, document) == "evidence_anchor"
    assert refused(world, world.document(), anchors=[]) == "evidence_anchor"
    assert refused(world, world.document(), anchors=None) == "evidence_anchor"
    assert verify(document, at=NOW, anchors=[other.fingerprint]).tier == "simulated"


def test_5_chain(world: Any, forge: Forge) -> None:
    assert refused(world, forge.document(), at=NOW + 61) == "evidence_chain"
    assert refused(world, forge.document(), at=NOW - 61) == "evidence_chain"
    stranger = SimulatedRoot.generate(clock=lambda: NOW)
    leaf = stranger._key.issue(stranger.certificate, "m", forge.key, not_before=NOW - 60, not_after=NOW + 60)
    assert refused(world, forge.document(certificate=leaf)) == "evidence_chain"


def test_6_signature(world: Any, forge: Forge) -> None:
    parts = cbor.decode(world.document())
    for signature in (bytes(96), parts[3][:95], b"", parts[3][48:] + parts[3][:48]):
        assert refused(world, cbor.encode([*parts[:3], signature])) == "evidence_signature"
    other = cbor.decode(world.document(user_data=b"other"))
    assert refused(world, cbor.encode([*parts[:2], other[2], parts[3]])) == "evidence_signature"


def test_7_time(world: Any, forge: Forge) -> None:
    assert refused(world, forge.document(timestamp=(NOW + 61) * 1000)) == "evidence_time"


def test_every_flipped_byte_is_refused(world: Any) -> None:
    document = world.document()
    for position in range(0, len(document), 3):
        flipped = bytearray(document)
        flipped[position] ^= 1 << position % 8
        assert refused(world, bytes(flipped)).startswith("evidence_")


def test_a_child_that_lives_for_days_goes_on_attesting() -> None:
    now = [NOW]
    root = SimulatedRoot.generate(clock=lambda: now[0])
    module = root.module("m")
    for day in range(4):
        now[0] = NOW + day * 86_400
        document = module.document({0: b"a" * 48, 1: b"b" * 48, 2: b"c" * 48}, b"", b"")
        assert verify(document, at=now[0], anchors=[root.fingerprint]).timestamp == now[0]


def test_a_root_is_kept_in_a_file(world: Any, tmp_path: Any) -> None:
    from isolate.errors import KeyFormatError, StorageError

    path = tmp_path / "root.pem"
    world.root.save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    again = SimulatedRoot.load(path, clock=lambda: NOW)
    document = again.module("m").document({0: b"a" * 48, 1: b"b" * 48, 2: b"c" * 48}, b"", b"")
    assert verify(document, at=NOW, anchors=[world.root.fingerprint]).product == "simulated"
    for nowhere in (path, tmp_path, "a\0b"):
        with pytest.raises(StorageError):
            world.root.save(nowhere)
    with pytest.raises(StorageError):
        SimulatedRoot.load(tmp_path / "none")
    (tmp_path / "bad").write_bytes(b"nothing")
    with pytest.raises(KeyFormatError):
        SimulatedRoot.load(tmp_path / "bad")
