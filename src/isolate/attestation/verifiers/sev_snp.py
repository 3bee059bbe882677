"""AMD SEV-SNP attestation reports, versions 2 to 5, under VCEK or VLEK (docs/spec/evidence.md, 4.3).

    >>> from isolate.attestation.verifiers.sev_snp import verify
    >>> verify(bytes(1183), at=0)
    Traceback (most recent call last):
    isolate.errors.EvidenceRefused: a report has 1184 bytes, not 1183 (check 1)

The checks, in order:

1. form: exactly 1184 bytes, no container;
2. version: 2 to 5, signature algorithm ECDSA P-384 with SHA-384;
3. unsigned: what the signature does not cover (0x330 to 0x49F, and the high bytes of r and s) is zero;
4. key: the collateral has one certificate for the kind of key that the report names, VCEK or VLEK, and its issuer;
5. anchor: that issuer's issuer is a pinned ARK (of Milan, Genoa or Turin);
6. chain: leaf to ARK, all valid at the time of verification;
7. product: the leaf's product and the report's CPUID are those of the ARK;
8. tcb: the leaf's component versions equal the report's reported_tcb, in the product's layout;
9. chip: a VCEK's hardware id equals the report's chip id; a VLEK has a provider's id and no hardware id;
10. signature: over bytes 0 to 0x29F, by the leaf's key.
"""

from __future__ import annotations

from collections.abc import Sequence

from isolate.attestation.claims import VerifiedClaims, require, verifier, vouch
from isolate.attestation.roots import PINNED, root
from isolate.crypto import x509
from isolate.errors import MalformedError

KIND = "sev-snp"
SIZE = 1184
SIGNED = 0x2A0
VERSIONS = range(2, 6)
_COMPONENT = 72  # bytes of r and of s, little-endian
_SCALAR = 48

_OID = "1.3.6.1.4.1.3704.1."
_PRODUCT_OID, _HWID_OID, _CSPID_OID = _OID + "2", _OID + "4", _OID + "5"
_SPL_OIDS = {
    "bootloader": _OID + "3.1",
    "tee": _OID + "3.2",
    "snp": _OID + "3.3",
    "microcode": _OID + "3.8",
    "fmc": _OID + "3.9",
}
# Where each component stands in the eight bytes of a TCB version. The bytes not named are reserved, and zero.
_OLD_LAYOUT = {"bootloader": 0, "tee": 1, "snp": 6, "microcode": 7}
_LAYOUTS = {
    "Milan": _OLD_LAYOUT,
    "Genoa": _OLD_LAYOUT,
    "Turin": {"fmc": 0, "bootloader": 1, "tee": 2, "snp": 3, "microcode": 7},
}
_HWID_SIZE = {"Milan": 64, "Genoa": 64, "Turin": 8}
_ARKS = {"Milan": "amd-ark-milan", "Genoa": "amd-ark-genoa", "Turin": "amd-ark-turin"}
# Family and models by CPUID, which reports state from version 3 on. Genoa's ARK also serves Bergamo and Siena.
_MODELS = {
    "Milan": (0x19, (range(0x10),)),
    "Genoa": (0x19, (range(0x10, 0x20), range(0xA0, 0xB0))),
    "Turin": (0x1A, (range(0x12),)),
}
_VCEK, _VLEK = 0, 1  # bits 4:2 of the key information


def _field(report: bytes, offset: int, size: int) -> int:
    return int.from_bytes(report[offset : offset + size], "little")


def _certificates(collateral: Sequence[bytes]) -> list[x509.Certificate]:
    """Every certificate of the collateral, once."""
    found: dict[bytes, x509.Certificate] = {}
    for data in collateral:
        for one in x509.load(data):
            found.setdefault(x509.fingerprint(one), one)
    return list(found.values())


def _select(collateral: Sequence[bytes], name: str) -> list[x509.Certificate]:
    """The leaf of this name and its issuer. The ARK is never taken from here."""
    try:
        found = _certificates(collateral)
    except MalformedError as error:
        found, problem = [], error.message
    else:
        problem = f"the collateral has not one {name[-4:]} certificate"
    leaves = [one for one in found if x509.subject(one) == name]
    require(len(leaves) == 1, 4, "key", problem)
    above = [one for one in found if one.subject == leaves[0].issuer and x509.issued_by(leaves[0], one)]
    require(len(above) == 1, 4, "issuer", f"the collateral has no certificate that issued the {name[-4:]}")
    return [leaves[0], above[0]]


def _integer(value: bytes | None) -> int | None:
    """A DER INTEGER of 0 to 255, as AMD writes component versions."""
    if value is None or len(value) not in (3, 4) or value[0] != 2 or value[1] != len(value) - 2:
        return None
    number = int.from_bytes(value[2:], "big", signed=True)
    return number if 0 <= number <= 255 else None


def _hardware_id(value: bytes | None, size: int) -> bytes | None:
    """The id itself: older certificates have it bare, newer ones in a DER OCTET STRING."""
    if value is not None and len(value) == size + 2 and value[:2] == bytes([4, size]):
        return value[2:]
    return value


def _product_name(certificate: x509.Certificate) -> str:
    """``Milan`` of ``Milan-B0``, from an IA5String."""
    value = x509.extension(certificate, _PRODUCT_OID) or b""
    if len(value) < 2 or value[0] != 0x16 or value[1] != len(value) - 2:
        return ""
    return value[2:].decode("ascii", errors="replace").partition("-")[0]


def _same_tcb(certificate: x509.Certificate, tcb: bytes, product: str) -> bool:
    layout = _LAYOUTS[product]
    reserved = [index for index in range(8) if index not in layout.values()]
    return all(tcb[index] == 0 for index in reserved) and all(
        _integer(x509.extension(certificate, _SPL_OIDS[name])) == tcb[index] for name, index in layout.items()
    )


def _same_model(report: bytes, product: str) -> bool:
    if _field(report, 0, 4) < 3:
        return True  # version 2 states no CPUID
    family, models = _MODELS[product]
    return report[0x188] == family and any(report[0x189] in one for one in models)


@verifier(max_size=64 * 1024)
def verify(
    evidence: bytes, *, at: int, anchors: Sequence[bytes] | None = None, collateral: Sequence[bytes] = ()
) -> VerifiedClaims:
    """Verify a report offline at the unix second ``at``.

    ``collateral`` holds certificates in PEM or DER, in any order: VCEK or VLEK, and the ASK or ASVK above it.
    Raises EvidenceRefused.
    """
    wrapped = evidence.startswith(b"HCLA")
    container = "an Azure HCL container: the report in it binds the HCL's data, not the workload's"
    length = f"a report has {SIZE} bytes, not {len(evidence)}"
    require(not wrapped and len(evidence) == SIZE, 1, "form", container if wrapped else length)
    report = evidence

    version, algorithm = _field(report, 0, 4), _field(report, 0x34, 4)
    known = version in VERSIONS and algorithm == 1
    require(known, 2, "version", f"report version {version} with signature algorithm {algorithm} is not known")

    r, s = report[0x2A0 : 0x2A0 + _COMPONENT], report[0x2E8 : 0x2E8 + _COMPONENT]
    unsigned = report[0x330:] + r[_SCALAR:] + s[_SCALAR:]
    require(not any(unsigned), 3, "unsigned", "bytes that the signature does not cover are not zero")

    key = (_field(report, 0x48, 4) >> 2) & 7
    require(key in (_VCEK, _VLEK), 4, "key", "the report is signed by no known kind of key")
    leaf, issuer = _select(collateral, "SEV-VCEK" if key == _VCEK else "SEV-VLEK")

    product = x509.subject(issuer).rpartition("-")[2]
    expected = f"SEV-{product}" if key == _VCEK else f"SEV-VLEK-{product}"
    trusted = PINNED[KIND] if anchors is None else anchors
    ark = x509.load(root(_ARKS[product]))[0] if product in _ARKS else None
    named = ark is not None and x509.subject(issuer) == expected and x509.fingerprint(ark) in trusted
    require(named, 5, "anchor", "the certificates are not anchored at a pinned ARK")

    try:
        expires, problem = x509.verify_chain([leaf, issuer, *([ark] if ark else [])], at=at), ""
    except MalformedError as error:
        expires, problem = 0, error.message
    require(not problem, 6, "chain", problem)

    same_product = _product_name(leaf) == product and _same_model(report, product)
    require(same_product, 7, "product", f"certificate and report disagree on the product {product}")

    tcb = report[0x180:0x188]
    require(_same_tcb(leaf, tcb, product), 8, "tcb", "certificate and report disagree on the TCB version")

    chip, size = report[0x1A0:0x1E0], _HWID_SIZE[product]
    raw_id, provider = x509.extension(leaf, _HWID_OID), x509.extension(leaf, _CSPID_OID)
    if key == _VCEK:
        same_chip = _hardware_id(raw_id, size) == chip[:size] and not any(chip[size:]) and any(chip)
    else:
        same_chip = raw_id is None and bool(provider)
    require(same_chip, 9, "chip", "certificate and report disagree on the chip")

    signature = r[:_SCALAR][::-1] + s[:_SCALAR][::-1]
    require(
        x509.verify_p384(leaf, report[:SIGNED], signature),
        10,
        "signature",
        "the report's signature does not verify",
    )

    policy = _field(report, 0x08, 8)
    digests = {"id_key": report[0xE0:0x110], "author_key": report[0x110:0x140]}
    return vouch(
        kind=KIND,
        tier="hardware",
        product=product,
        measurements={"MEASUREMENT": report[0x90:0xC0]},
        debug=bool(policy >> 19 & 1),
        binding=report[0x50:0x90],
        expires=expires,
        platform=chip[:size] if key == _VCEK else (provider or b"")[2:],
        tcb={
            **{name: tcb[index] for name, index in _LAYOUTS[product].items()},
            "guest_svn": _field(report, 0x04, 4),
            "report_version": version,
        },
        svn=_field(report, 0x04, 4),
        smt=bool(policy >> 16 & 1),
        migration=bool(policy >> 18 & 1),
        vmpl=_field(report, 0x30, 4),
        signers={name: digest for name, digest in digests.items() if any(digest)},
        host_data=report[0xC0:0xE0],
        not_checked=("revocation of the certificates (AMD's CRL)",),
    )
