"""The simulated root of evidence: it signs what its process measured, and stands for hardware in tests and demos.

    >>> from isolate.launch.root import SimulatedRoot
    >>> root = SimulatedRoot.generate()
    >>> document = root.module("module-1").document({0: b"a" * 48, 1: b"b" * 48, 2: b"c" * 48}, b"bound", b"nonce")
    >>> from isolate.attestation.verifiers.simulated import verify
    >>> claims = verify(document, at=root.now(), anchors=[root.fingerprint])
    >>> claims.tier, claims.binding
    ('simulated', b'bound')

Whoever holds the root key can claim any measurement, and it is an ordinary file or an ordinary process's memory:
this shows a protocol, and protects nothing. docs/spec/evidence.md, 4.1, has the document byte by byte.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

from isolate.attestation.verifiers.cose import signed_bytes
from isolate.attestation.verifiers.simulated import FIELDS, PROTECTED, REGISTER_SIZE, REGISTERS, TIER
from isolate.crypto import cbor, x509
from isolate.crypto.signing import write_new_file
from isolate.errors import KeyFormatError, MalformedError, StorageError, UsageError

ROOT_LIFETIME = 10 * 365 * 86400  # seconds
MODULE_LIFETIME = 24 * 3600
_BACKDATED = 300  # seconds: the clocks of platform and verifier differ

Clock = Callable[[], float]


class SimulatedRoot:
    """A P-384 root key and its self-signed certificate. Its holder is the simulated platform, alone."""

    __slots__ = ("_clock", "_key", "certificate")

    def __init__(self, key: x509.P384Key, certificate: bytes, *, clock: Clock = time.time) -> None:
        self._key = key
        self._clock = clock
        self.certificate = certificate

    @classmethod
    def generate(cls, *, clock: Clock = time.time) -> Self:
        key, now = x509.P384Key.generate(), int(clock())
        certificate = key.self_signed(
            "simulated root", not_before=max(now - _BACKDATED, 0), not_after=now + ROOT_LIFETIME
        )
        return cls(key, certificate, clock=clock)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, clock: Clock = time.time) -> Self:
        """Read what ``save`` wrote. Raises KeyFormatError or StorageError."""
        try:
            pem = Path(path).read_bytes()[:65536]
        except OSError as error:
            raise StorageError(f"cannot read {os.fspath(path)}: {error.strerror}") from None
        key_pem, mark, certificate = pem.partition(b"-----BEGIN CERTIFICATE-----")
        try:
            return cls(x509.P384Key.from_pem(key_pem), x509.der(x509.load(mark + certificate)[0]), clock=clock)
        except MalformedError:
            raise KeyFormatError(f"{os.fspath(path)} holds no simulated root", hint="make a new one") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write key and certificate (PEM) to a new file that only its owner may read. Raises StorageError."""
        pem = self._key.to_pem() + x509.pem(self.certificate)
        write_new_file(path, pem, mode=0o600)

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 of the certificate, 32 bytes: what a policy lists as a simulated anchor."""
        return x509.fingerprint(self.certificate)

    def now(self) -> int:
        return int(self._clock())

    def module(self, module_id: str) -> SimulatedModule:
        """A key of its own for one launched child, certified by this root for 24 hours at a time."""
        return SimulatedModule(module_id, self)

    def certify(self, module_id: str, key: x509.P384Key) -> tuple[bytes, int]:
        """A leaf certificate (DER) for a child's key, and the unix second at which it ends."""
        now = self.now()
        end = now + MODULE_LIFETIME
        begin = max(now - _BACKDATED, 0)
        return self._key.issue(self.certificate, module_id, key, not_before=begin, not_after=end), end

    def __repr__(self) -> str:
        return f"SimulatedRoot({self.fingerprint.hex()[:16]}, key hidden)"


class SimulatedModule:
    """What signs the documents of one child. The caller says what it measured; a child never measures itself."""

    __slots__ = ("_end", "_key", "_leaf", "_root", "module_id")

    def __init__(self, module_id: str, root: SimulatedRoot) -> None:
        self.module_id = module_id
        self._root = root
        self._key = x509.P384Key.generate()
        self._leaf, self._end = root.certify(module_id, self._key)

    def document(
        self,
        pcrs: Mapping[int, bytes],
        user_data: bytes,
        nonce: bytes,
        timestamp_ms: int | None = None,
        *,
        debug: bool = False,
    ) -> bytes:
        """A signed document. ``pcrs`` are registers 0, 1 and 2 of 48 bytes. Raises UsageError."""
        if sorted(pcrs) != list(range(REGISTERS)) or any(len(one) != REGISTER_SIZE for one in pcrs.values()):
            raise UsageError(f"registers 0 to {REGISTERS - 1} are {REGISTER_SIZE} bytes each")
        if self._root.now() > self._end - MODULE_LIFETIME // 2:
            self._leaf, self._end = self._root.certify(self.module_id, self._key)
        fields = {
            "module_id": self.module_id,
            "tier": TIER,
            "timestamp": self._root.now() * 1000 if timestamp_ms is None else timestamp_ms,
            "digest": "SHA384",
            "pcrs": {index: bytes(pcrs[index]) for index in sorted(pcrs)},
            "debug": debug,
            "certificate": self._leaf,
            "cabundle": [self._root.certificate],
            "user_data": bytes(user_data),
            "nonce": bytes(nonce),
        }
        payload = cbor.encode({name: fields[name] for name in FIELDS})
        signature = self._key.sign(signed_bytes(PROTECTED, payload))
        return cbor.encode([PROTECTED, {}, payload, signature])

    def __repr__(self) -> str:
        return f"SimulatedModule({self.module_id}, key hidden)"
