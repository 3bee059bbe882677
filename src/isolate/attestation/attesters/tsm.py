"""Ask the kernel for an SEV-SNP report or a TDX quote, over configfs (docs/spec/evidence.md, 8.3).

    >>> from isolate.attestation.attesters.tsm import certificates
    >>> certificates(bytes(24))
    ()

Written against the kernel's Documentation/ABI/testing/configfs-tsm-report: an entry is a directory, ``inblob``
takes up to 64 bytes, ``outblob`` gives the report, ``auxblob`` the certificates that the host left, ``provider``
the kind, ``generation`` the count of writes. It has been tested against a fake that behaves so, and never on real
hardware: none was at hand.
"""

from __future__ import annotations

import os
import secrets
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from isolate.attestation.evidence import MAX_COLLATERAL, MAX_EVIDENCE, Runtime
from isolate.errors import ControlMissing, MalformedError, UnavailableError, UsageError

ROOT = "/sys/kernel/config/tsm/report"
KINDS = {"sev_guest": "sev-snp", "tdx_guest": "tdx"}
_TRIES = 3

# The GHCB specification's certificate table: GUID (16, mixed-endian), offset (4), length (4), little-endian.
_GUIDS = {
    uuid.UUID("63da758d-e664-4564-adc5-f4b93be8accd"): "VCEK",
    uuid.UUID("a8074bc2-a25a-483e-aae6-39c045a0b8a1"): "VLEK",
    uuid.UUID("4ab7b379-bbac-4fe4-a02f-05aef327c782"): "ASK",
}
_ROW = 24


class Files(Protocol):
    """The five operations on configfs, so that a test can stand in for the kernel."""

    def make(self, path: Path) -> None: ...
    def remove(self, path: Path) -> None: ...
    def read(self, path: Path, limit: int) -> bytes: ...
    def write(self, path: Path, data: bytes) -> None: ...


class _Configfs:
    def make(self, path: Path) -> None:
        path.mkdir()

    def remove(self, path: Path) -> None:
        path.rmdir()

    def read(self, path: Path, limit: int) -> bytes:
        with path.open("rb") as file:
            return file.read(limit)

    def write(self, path: Path, data: bytes) -> None:
        # One write(2): the kernel takes a blob whole.
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, data)
        finally:
            os.close(descriptor)


def certificates(table: bytes) -> tuple[bytes, ...]:
    """VCEK or VLEK and its issuer from an auxblob, as collateral (DER). Raises MalformedError."""
    found, at = [], 0
    while at + _ROW <= len(table) and any(table[at : at + _ROW]):
        name = _GUIDS.get(uuid.UUID(bytes_le=table[at : at + 16]))
        offset = int.from_bytes(table[at + 16 : at + 20], "little")
        length = int.from_bytes(table[at + 20 : at + 24], "little")
        if offset + length > len(table):
            raise MalformedError("the host's certificate table points beyond its end")
        if name is not None:
            found.append(table[offset : offset + length])
        at += _ROW
    return tuple(found)


class TsmAttester:
    """The inside of a confidential VM. ``collateral`` is what the host left with the last report."""

    def __init__(self, root: str = ROOT, *, files: Files | None = None) -> None:
        self._root = Path(root)
        self._files = files or _Configfs()
        self.collateral: tuple[bytes, ...] = ()

    def attest(self, runtime: Runtime) -> bytes:
        """A report or quote whose report data is the runtime's binding.

        Raises ControlMissing where the kernel offers none, UsageError when it is of another kind than the runtime
        map says, UnavailableError when it fails.
        """
        entry = self._root / f"isolate-{secrets.token_hex(8)}"
        try:
            self._files.make(entry)
        except OSError as error:
            raise ControlMissing(f"no attestation reports here: {error.strerror}") from None
        try:
            return self._report(entry, runtime)
        except OSError as error:
            raise UnavailableError(f"the kernel gave no report: {error.strerror}") from None
        finally:
            with suppress(OSError):  # an entry that stays costs memory, and nothing else
                self._files.remove(entry)

    def _report(self, entry: Path, runtime: Runtime) -> bytes:
        provider = self._files.read(entry / "provider", 64).decode("ascii", errors="replace").strip()
        kind = KINDS.get(provider)
        if kind != runtime.kind:
            raise UsageError(f"this machine gives {kind or 'unknown'} evidence, the runtime map says another kind")
        for _ in range(_TRIES):
            self._files.write(entry / "inblob", runtime.binding())
            before = self._files.read(entry / "generation", 32)
            report = self._files.read(entry / "outblob", MAX_EVIDENCE)
            table = self._files.read(entry / "auxblob", MAX_COLLATERAL) if kind == "sev-snp" else b""
            # Another writer between would have the report bind its own data.
            if self._files.read(entry / "generation", 32) == before:
                self.collateral = certificates(table)
                return report
        raise UnavailableError("somebody else writes to this report entry")
