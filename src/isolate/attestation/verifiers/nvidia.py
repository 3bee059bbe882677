"""NVIDIA GPU evidence: a signed SPDM measurement report with its chain (docs/spec/evidence.md, 4.5).

    >>> from isolate.attestation.verifiers.nvidia import verify
    >>> verify(b"[]", at=0)
    Traceback (most recent call last):
    isolate.errors.EvidenceRefused: this is no evidence of one GPU (check 1)

The checks, in order:

1. form: JSON {arch, nonce, evidence, certificate} of one GPU, or a bare report whose chain is the collateral;
2. report: a GET_MEASUREMENTS request for all signed blocks, its answer, and a signature of 96 bytes, nothing else;
3. anchor: the chain ends at NVIDIA's pinned device root;
4. chain: leaf to root, all valid at the time of verification;
5. signature: over everything before it, ECDSA P-384, by the leaf's key;
6. nonce: the JSON's nonce is the one in the signed request, and its architecture is the leaf's;
7. firmware id: the report's, where it states one, is the one that the leaf was issued for.

Authentic is not good: nobody here compares the measurements with the vendor's reference manifests (RIM) or asks
its OCSP responder. A certificate on hold, or old firmware, still verifies; that stands under not_checked.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence

from attrs import frozen

from isolate.attestation.claims import VerifiedClaims, require, verifier, vouch
from isolate.attestation.roots import PINNED
from isolate.crypto import x509
from isolate.errors import MalformedError

KIND = "nvidia-gpu"
MAX_SIZE = 64 * 1024
NONCE_SIZE = 32
_REQUEST = 37  # 11 e0 01 ff, nonce 32, slot
_RECORD = _REQUEST + 8  # 11 60, two parameters, number of blocks, length of the record (3, little-endian)
_BLOCKS = 64
_FWID = 20  # type of the opaque field with the firmware id
_FWID_OIDS = ("2.23.133.5.4.1", "2.23.133.5.4.1.1")  # DICE TcbInfo, alone or as a sequence
_ARCHITECTURES = {"HOPPER": "GH", "BLACKWELL": "GB"}
_FIELDS = ("arch", "certificate", "evidence", "nonce")


@frozen
class _Report:
    """The signed parts of a report."""

    nonce: bytes
    measurements: dict[str, bytes]
    fwid: bytes
    signed: bytes
    signature: bytes


def _parse(data: bytes) -> _Report:
    """Raises MalformedError unless every byte is accounted for."""
    if data[:4] != b"\x11\xe0\x01\xff" or len(data) < _RECORD or data[_REQUEST : _REQUEST + 2] != b"\x11\x60":
        raise MalformedError("no SPDM measurement report")
    blocks, record = data[_REQUEST + 4], int.from_bytes(data[_REQUEST + 5 : _RECORD], "little")
    at = _RECORD + record  # then the answer's nonce, the length of opaque data, that data, the signature
    opaque = int.from_bytes(data[at + NONCE_SIZE : at + NONCE_SIZE + 2], "little")
    end = at + NONCE_SIZE + 2 + opaque
    if len(data) != end + x509.P384_SIGNATURE or blocks > 254:
        raise MalformedError("the report does not end where it says")
    measurements = _measurements(data[_RECORD:at])
    if len(measurements) != blocks:
        raise MalformedError("the report has another number of blocks than it says")
    fields = _opaque(data[at + NONCE_SIZE + 2 : end])
    return _Report(data[4 : 4 + NONCE_SIZE], measurements, fields.get(_FWID, b""), data[:end], data[end:])


def _measurements(record: bytes) -> dict[str, bytes]:
    """Blocks of index, 01 (DMTF), size (2), and in it type, size (2) and value."""
    found, at = {}, 0
    while at < len(record):
        size = int.from_bytes(record[at + 2 : at + 4], "little")
        block = record[at + 4 : at + 4 + size]
        whole = len(block) == size >= 3 and int.from_bytes(block[1:3], "little") == size - 3
        name = f"M{record[at]:02d}"
        if not whole or record[at + 1] != 1 or name in found:
            raise MalformedError("a measurement block is malformed")
        found[name] = block[3:]
        at += 4 + size
    return found


def _opaque(data: bytes) -> dict[int, bytes]:
    """Fields of type (2), size (2), both little-endian, and value."""
    found, at = {}, 0
    while at < len(data):
        kind, size = int.from_bytes(data[at : at + 2], "little"), int.from_bytes(data[at + 2 : at + 4], "little")
        value = data[at + 4 : at + 4 + size]
        if at + 4 > len(data) or len(value) != size or kind in found:
            raise MalformedError("an opaque field is malformed")
        found[kind] = value
        at += 4 + size
    return found


@frozen
class _Evidence:
    report: bytes
    chain: list[x509.Certificate]
    nonce: str | None  # as the JSON states it
    architecture: str | None


def _open(evidence: bytes, collateral: Sequence[bytes]) -> _Evidence | None:
    """The JSON form, or the bare one with its chain as collateral."""
    try:
        if evidence[:2] == b"\x11\xe0":
            return _Evidence(evidence, [one for data in collateral for one in x509.load(data)], None, None)
        value = json.loads(evidence.decode("utf-8"))
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if not isinstance(value, dict) or any(not isinstance(value.get(name), str) for name in _FIELDS):
            return None
        report = base64.b64decode(value["evidence"], validate=True)
        chain = x509.load(base64.b64decode(value["certificate"], validate=True))
    except (ValueError, RecursionError, binascii.Error, MalformedError):
        return None
    # What the signature does not cover has one form only: re-encoding must give the same text.
    if base64.b64encode(report).decode() != value["evidence"]:
        return None
    return _Evidence(report, chain, value["nonce"], value["arch"])


@verifier(max_size=MAX_SIZE)
def verify(
    evidence: bytes, *, at: int, anchors: Sequence[bytes] | None = None, collateral: Sequence[bytes] = ()
) -> VerifiedClaims:
    """Verify a GPU's report offline at the unix second ``at``. Its binding is the nonce (32 bytes) it signed.

    Raises EvidenceRefused.
    """
    found = _open(evidence, collateral)
    require(found is not None and len(found.chain) > 1, 1, "form", "this is no evidence of one GPU")
    one: _Evidence = found  # type: ignore[assignment]
    try:
        report, problem = _parse(one.report), ""
    except MalformedError as error:
        report, problem = _Report(b"", {}, b"", b"", b""), error.message
    require(not problem and len(report.measurements) <= _BLOCKS, 2, "report", problem)

    trusted = PINNED[KIND] if anchors is None else anchors
    anchored = x509.fingerprint(one.chain[-1]) in trusted
    require(anchored, 3, "anchor", "the chain does not end at NVIDIA's root")
    try:
        expires, problem = x509.verify_chain(one.chain, at=at), ""
    except MalformedError as error:
        expires, problem = 0, error.message
    require(not problem, 4, "chain", problem)

    leaf, device = one.chain[0], one.chain[1]
    signed = x509.verify_p384(leaf, report.signed, report.signature)
    require(signed, 5, "signature", "the report's signature does not verify")

    stated = one.nonce is None or one.nonce.lower() == report.nonce.hex()
    prefix = _ARCHITECTURES.get(one.architecture or "", "?")
    architecture = one.architecture is None or x509.subject(leaf).startswith(prefix)
    require(stated and architecture, 6, "nonce", "the JSON states another nonce or architecture than was signed")

    issued_for = next((x509.extension(leaf, oid) for oid in _FWID_OIDS if x509.extension(leaf, oid)), None) or b""
    # Firmware of 2023 (driver 535) states none.
    same = not report.fwid or (len(report.fwid) == 48 and report.fwid in issued_for)
    require(same, 7, "firmware_id", "certificate and report disagree on the firmware id")
    return vouch(
        kind=KIND,
        tier="hardware",
        product=x509.subject(leaf).partition(" ")[0],
        measurements=report.measurements,
        binding=report.nonce,
        expires=expires,
        platform=x509.fingerprint(device),
        signers={"fwid": report.fwid} if report.fwid else {},
        not_checked=(
            "the firmware: no measurement was compared with the vendor's reference manifests (RIM)",
            "revocation of the certificates (the vendor's OCSP)",
            "whether the GPU is in its confidential mode, and not its developers' one",
            *(() if report.fwid else ("the firmware id: this firmware states none",)),
        ),
    )
