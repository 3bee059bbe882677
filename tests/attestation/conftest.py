"""A simulated world with its clock in hand, and the real evidence of tests/vectors/attestation."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve, frozen

from isolate.attestation.appraisal import Appraisal, appraise
from isolate.attestation.evidence import Envelope, KeyDigests, Runtime, Slot
from isolate.attestation.policy import Policy, Reference
from isolate.attestation.verifiers.cose import signed_bytes
from isolate.crypto import cbor, x509
from isolate.launch.root import SimulatedRoot

VECTORS = Path(__file__).parents[1] / "vectors" / "attestation"
NOW = 1_780_000_000
NONCE = b"n" * 32
PCRS = {0: b"\x0a" * 48, 1: b"\x0b" * 48, 2: b"\x0c" * 48}
JUNE = 1_780_272_000  # 2026-06-01


@frozen
class World:
    """One simulated platform, one enclave on it, and a policy that admits it."""

    root: SimulatedRoot
    runtime: Runtime
    policy: Policy

    def document(self, pcrs: Mapping[int, bytes] = PCRS, runtime: Runtime | None = None, **changes: Any) -> bytes:
        runtime = runtime or self.runtime
        fields = {"user_data": runtime.binding(), "nonce": runtime.nonce, "timestamp_ms": NOW * 1000, **changes}
        return self.root.module("module-1").document(pcrs, **fields)

    def envelope(
        self, pcrs: Mapping[int, bytes] = PCRS, runtime: Runtime | None = None, **changes: Any
    ) -> Envelope:
        runtime = runtime or self.runtime
        return Envelope("simulated", self.document(pcrs, runtime, **changes), (), runtime)

    def appraise(self, envelope: Envelope | bytes | None = None, **changes: Any) -> Appraisal:
        asked: dict[str, Any] = {
            "policy": self.policy, "nonce": NONCE, "at": NOW, "slot": self.runtime.slot, "purpose": "train",
        }  # fmt: skip
        return appraise(envelope or self.envelope(), **(asked | changes))

    def with_runtime(self, **changes: Any) -> Runtime:
        return evolve(self.runtime, **changes)


@pytest.fixture(scope="session")
def world() -> World:
    root = SimulatedRoot.generate(clock=lambda: NOW)
    keys = KeyDigests.of({"sign": b"s" * 64, "channel": b"c" * 32, "hpke": b"h" * 1216})
    runtime = Runtime(
        kind="simulated", nonce=NONCE, keys_digest=keys.digest, purpose="train", slot=Slot("job", 0, 1)
    )
    reference = Reference("trainer-1", "simulated", {f"PCR{index}": one for index, one in PCRS.items()})
    policy = Policy(
        lineage="acme/train",
        sequence=3,
        references=(reference,),
        simulated_anchors=(root.fingerprint,),
        INSECURE_accept_simulated=True,
    )
    return World(root, runtime, policy)


@pytest.fixture(scope="session")
def vector() -> Callable[[str], bytes]:
    """The bytes of a file of tests/vectors/attestation; base64 is decoded."""

    def read(name: str) -> bytes:
        data = (VECTORS / name).read_bytes()
        return base64.b64decode(data) if name.endswith(".b64") else data

    return read


@frozen
class NitroRoot:
    """A private root that signs documents in Nitro's own shape: what AWS could send and we have no sample of."""

    key: x509.P384Key
    certificate: bytes
    leaf_key: x509.P384Key
    leaf: bytes

    @property
    def fingerprint(self) -> bytes:
        return x509.fingerprint(self.certificate)

    def fields(self, **changes: Any) -> dict[str, Any]:
        return {
            "module_id": "i-0123456789abcdef0-enc0123456789abcdef",
            "digest": "SHA384",
            "timestamp": NOW * 1000,
            "pcrs": {0: b"\x01" * 48, 1: b"\x02" * 48, 2: b"\x03" * 48},
            "certificate": self.leaf,
            "cabundle": [self.certificate],
            "public_key": None,
            "user_data": b"bound",
            "nonce": b"nonce",
        } | changes

    def document(
        self,
        payload: bytes,
        *,
        protected: bytes | None = None,
        unprotected: Any = None,
        signature: bytes | None = None,
    ) -> bytes:
        protected = cbor.encode({1: -35}) if protected is None else protected
        signature = self.leaf_key.sign(signed_bytes(protected, payload)) if signature is None else signature
        return cbor.encode([protected, {} if unprotected is None else unprotected, payload, signature])


@pytest.fixture(scope="session")
def nitro_root() -> NitroRoot:
    key, leaf_key = x509.P384Key.generate(), x509.P384Key.generate()
    certificate = key.self_signed("private root", not_before=NOW - 1000, not_after=NOW + 100_000)
    leaf = key.issue(certificate, "module", leaf_key, not_before=NOW - 100, not_after=NOW + 10_000)
    return NitroRoot(key, certificate, leaf_key, leaf)
