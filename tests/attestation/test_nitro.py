"""Nitro documents: real ones, those that could be real, and every way to break one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cbor2
import pytest

from isolate.attestation.verifiers.cose import signed_bytes
from isolate.attestation.verifiers.nitro import own_time, verify
from isolate.crypto import cbor, x509
from isolate.errors import EvidenceRefused
from isolate.launch.root import SimulatedRoot

NOW = 1_780_000_000
REAL = "nitro/evervault_valid.bin"
P384_ORDER = int(
    "ffffffffffffffffffffffffffffffffffffffffffffffffc7634d81f4372ddf581a0db248b0a77aecec196accc52973", 16
)


def refused(document: bytes, at: int | None = None, **changes: Any) -> str:
    with pytest.raises(EvidenceRefused) as error:
        verify(document, at=NOW if at is None else at, **changes)
    return error.value.code


def test_a_real_document(vector: Callable[[str], bytes]) -> None:
    document = vector(REAL)
    claims = verify(document, at=own_time(document))
    assert (claims.kind, claims.tier, claims.product) == ("nitro", "hardware", "nitro")
    assert sorted(claims.measurements, key=lambda name: int(name[3:])) == [f"PCR{i}" for i in range(16)]
    assert claims.nonce is not None and len(claims.nonce) == 256 and claims.binding == b"" and not claims.debug
    assert claims.platform == b"i-020b6af9246d90e92" and claims.timestamp == own_time(document)
    assert claims.not_checked and claims.expires is not None


def test_optionals_of_a_real_document(vector: Callable[[str], bytes]) -> None:
    document = vector("nitro/blocky_prod_2024-09-07.b64")
    claims = verify(document, at=own_time(document))
    assert len(claims.public_key) == len(claims.binding) == len(claims.nonce or b"") == 1024
    document = vector("nitro/cape_2022.bin")
    assert len(verify(document, at=own_time(document)).public_key) == 32


@pytest.mark.threat("ATT-17")
def test_indefinite_length_maps_and_null_optionals_are_authentic(nitro_root: Any) -> None:
    """The raw payload bytes are verified, in whatever form of CBOR they are."""
    fields = nitro_root.fields(public_key=None, user_data=None, nonce=None)
    pairs = b"".join(cbor2.dumps(name) + cbor2.dumps(value) for name, value in fields.items())
    pcrs = b"".join(cbor2.dumps(i) + cbor2.dumps(one) for i, one in fields["pcrs"].items())
    for payload in (
        b"\xbf" + pairs + b"\xff",
        (b"\xbf" + pairs + b"\xff").replace(cbor2.dumps(fields["pcrs"]), b"\xbf" + pcrs + b"\xff"),
        b"\xb9\x00\x09" + pairs,
        cbor2.dumps({name: value for name, value in fields.items() if value is not None}),
    ):
        claims = verify(nitro_root.document(payload), at=NOW, anchors=[nitro_root.fingerprint])
        assert claims.measurements["PCR0"] == b"\x01" * 48 and claims.nonce is None


def test_the_vendor_s_tag_may_stand_around_it(vector: Callable[[str], bytes]) -> None:
    document = vector(REAL)
    assert verify(b"\xd2" + document, at=own_time(document)).kind == "nitro"
    assert refused(b"\xd1" + document) == "evidence_form"
    assert refused(b"\xd2\xd2" + document) == "evidence_form"


@pytest.mark.threat("ATT-17")
def test_1_a_document_wrapped_in_a_container_is_refused(vector: Callable[[str], bytes]) -> None:
    document = vector(REAL)
    at = own_time(document)
    for wrapped in (
        len(document).to_bytes(4, "big") + document,
        len(document).to_bytes(4, "big") + document + bytes(8),
        document + b"\0",
        document + document,
        b"\0" + document,
        cbor2.dumps(document),
        cbor2.dumps([document]),
        cbor2.dumps({"document": document}),
    ):
        assert refused(wrapped, at) == "evidence_form"


def test_1_truncated(vector: Callable[[str], bytes]) -> None:
    document = vector(REAL)
    at = own_time(document)
    for size in [*range(1, 200), *range(200, len(document), 17), len(document) - 1]:
        assert refused(document[:size], at).startswith("evidence_")


def test_1_unprotected_header_and_shapes(nitro_root: Any) -> None:
    payload = cbor.encode(nitro_root.fields())
    anchors = [nitro_root.fingerprint]
    assert refused(nitro_root.document(payload, unprotected={1: -35}), anchors=anchors) == "evidence_form"
    parts = cbor.decode(nitro_root.document(payload))
    for odd in ([*parts[:1], None, *parts[2:]], parts[:3], [*parts, b""], [parts[0], {}, parts[2], None], {}, 7):
        assert refused(cbor.encode(odd), anchors=anchors) == "evidence_form"


@pytest.mark.threat("ATT-18")
def test_2_algorithm_swap(nitro_root: Any) -> None:
    """The signature is good for the header that stands there; the header is not one we accept."""
    payload = cbor.encode(nitro_root.fields())
    anchors = [nitro_root.fingerprint]
    for header in ({1: -7}, {1: -36}, {1: -8}, {1: "ES384"}, {}, {1: -35, 4: b"key"}, {1: -35, 2: [1]}):
        swapped = nitro_root.document(payload, protected=cbor.encode(header))
        assert refused(swapped, anchors=anchors) == "evidence_header"
    assert refused(nitro_root.document(payload, protected=b""), anchors=anchors) == "evidence_header"


@pytest.mark.parametrize(
    "change",
    [
        {"digest": "SHA512"}, {"digest": None}, {"timestamp": "now"}, {"timestamp": -1}, {"timestamp": 2**53},
        {"timestamp": True}, {"pcrs": {}}, {"pcrs": {32: b"\1" * 48}}, {"pcrs": {0: b"\1" * 47}},
        {"pcrs": {"0": b"\1" * 48}}, {"pcrs": {0: "x" * 48}}, {"pcrs": []}, {"cabundle": []}, {"cabundle": None},
        {"cabundle": [None]}, {"cabundle": [b""] * 9}, {"certificate": None}, {"nonce": b"x" * 1025},
        {"user_data": "text"}, {"public_key": 7}, {"module_id": ""}, {"module_id": "a\nb"}, {"module_id": 1},
    ],
    ids=str,
)  # fmt: skip
def test_3_fields(nitro_root: Any, change: dict[str, Any]) -> None:
    payload = cbor2.dumps(nitro_root.fields(**change))
    assert refused(nitro_root.document(payload), anchors=[nitro_root.fingerprint]) == "evidence_fields"


def test_3_keys_twice_and_missing(nitro_root: Any) -> None:
    fields = nitro_root.fields()
    pairs = b"".join(cbor2.dumps(name) + cbor2.dumps(value) for name, value in fields.items())
    twice = b"\xaa" + pairs + cbor2.dumps("nonce") + cbor2.dumps(b"second")
    anchors = [nitro_root.fingerprint]
    assert refused(nitro_root.document(twice), anchors=anchors) == "evidence_fields"
    for name in ("module_id", "digest", "timestamp", "pcrs", "certificate", "cabundle"):
        payload = cbor.encode({key: value for key, value in fields.items() if key != name})
        assert refused(nitro_root.document(payload), anchors=anchors) == "evidence_fields"
    assert refused(nitro_root.document(b"\x01"), anchors=anchors) == "evidence_fields"


def test_an_unknown_field_is_said(nitro_root: Any) -> None:
    payload = cbor.encode(nitro_root.fields(extra=1))
    claims = verify(nitro_root.document(payload), at=NOW, anchors=[nitro_root.fingerprint])
    assert any("extra" in one for one in claims.not_checked)


@pytest.mark.threat("ATT-3")
def test_4_evidence_supplied_root(nitro_root: Any, vector: Callable[[str], bytes]) -> None:
    document = nitro_root.document(cbor.encode(nitro_root.fields()))
    assert refused(document) == "evidence_anchor"
    real = vector(REAL)
    assert refused(real, own_time(real), anchors=[b"x" * 32]) == "evidence_anchor"
    assert refused(real, own_time(real), anchors=[]) == "evidence_anchor"


def test_4_a_simulated_document_is_no_nitro_document() -> None:
    root = SimulatedRoot.generate(clock=lambda: NOW)
    document = root.module("m").document({0: b"a" * 48, 1: b"b" * 48, 2: b"c" * 48}, b"", b"")
    assert refused(document, anchors=[root.fingerprint]) == "evidence_header"


def test_5_chain(nitro_root: Any, vector: Callable[[str], bytes]) -> None:
    real = vector(REAL)
    assert refused(real, NOW) == "evidence_chain"
    anchors = [nitro_root.fingerprint]
    other = x509.P384Key.generate()
    stray = other.issue(nitro_root.certificate, "m", nitro_root.leaf_key, not_before=NOW - 9, not_after=NOW + 9)
    for change in ({"certificate": stray}, {"cabundle": [nitro_root.certificate, nitro_root.certificate]}):
        document = nitro_root.document(cbor.encode(nitro_root.fields(**change)))
        assert refused(document, anchors=anchors) == "evidence_chain"
    issuing_leaf = nitro_root.leaf_key.issue(
        nitro_root.leaf, "below", nitro_root.leaf_key, not_before=NOW - 9, not_after=NOW + 9
    )
    fields = nitro_root.fields(certificate=issuing_leaf, cabundle=[nitro_root.certificate, nitro_root.leaf])
    assert refused(nitro_root.document(cbor.encode(fields)), anchors=anchors) == "evidence_chain"


def test_5_a_certificate_that_is_none(nitro_root: Any) -> None:
    for certificate in (b"", b"junk", nitro_root.leaf + b"\0", x509.pem(nitro_root.leaf)):
        document = nitro_root.document(cbor.encode(nitro_root.fields(certificate=certificate)))
        assert refused(document, anchors=[nitro_root.fingerprint]) == "evidence_malformed"


@pytest.mark.threat("ATT-18")
def test_6_zero_signature(nitro_root: Any, vector: Callable[[str], bytes]) -> None:
    parts = cbor2.loads(vector(REAL))
    at = own_time(vector(REAL))
    r, s = parts[3][:48], parts[3][48:]
    for signature in (
        bytes(96),
        bytes(48) + s,
        r + bytes(48),
        r + s + b"\0",
        (r + s)[:95],
        b"",
        s + r,
        b"\xff" * 96,
    ):
        assert refused(cbor2.dumps([*parts[:3], signature]), at) == "evidence_signature"


def test_6_the_other_half_of_a_malleable_signature_verifies(vector: Callable[[str], bytes]) -> None:
    """(r, n - s) is as good as (r, s): so nothing may take a document's hash for a replay key."""
    document = vector(REAL)
    parts = cbor2.loads(document)
    other = (P384_ORDER - int.from_bytes(parts[3][48:], "big")).to_bytes(48, "big")
    again = cbor2.dumps([*parts[:3], parts[3][:48] + other])
    assert again != document and verify(again, at=own_time(document)).kind == "nitro"


def test_6_a_signature_over_something_else(nitro_root: Any) -> None:
    payload = cbor.encode(nitro_root.fields())
    protected = cbor.encode({1: -35})
    for message in (payload, signed_bytes(b"", payload), signed_bytes(protected, payload + b"\0")):
        document = nitro_root.document(payload, signature=nitro_root.leaf_key.sign(message))
        assert refused(document, anchors=[nitro_root.fingerprint]) == "evidence_signature"


def test_7_time(nitro_root: Any) -> None:
    for seconds in (-101, 10_001):
        document = nitro_root.document(cbor.encode(nitro_root.fields(timestamp=(NOW + seconds) * 1000)))
        assert refused(document, anchors=[nitro_root.fingerprint]) == "evidence_time"


def _flips(document: bytes, positions: range) -> None:
    at = own_time(document)
    for position in positions:
        flipped = bytearray(document)
        flipped[position] ^= 1 << position % 8
        assert refused(bytes(flipped), at).startswith("evidence_"), position


@pytest.mark.threat("ATT-19")
def test_flipped_bytes_are_refused(vector: Callable[[str], bytes]) -> None:
    _flips(vector(REAL), range(0, len(vector(REAL)), 11))


@pytest.mark.slow
@pytest.mark.threat("ATT-19")
def test_every_flipped_byte_is_refused(vector: Callable[[str], bytes]) -> None:
    _flips(vector(REAL), range(len(vector(REAL))))
