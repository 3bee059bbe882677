"""X.509 certificates inside an enclave: for an engine that speaks TLS and is to be protected unmodified.

    >>> credentials = obtain(workload)  # doctest: +SKIP
    >>> credentials.spiffe              # doctest: +SKIP
    'spiffe://acme.simulated/job/digits/train/rank/0'

Mode: workload. ``keep`` has a certificate renewed well before it ends, for engines that take bytes (``current``)
and for those that read files (``folder=``). Where a channel of isolate.channel can be used, use that: what a
certificate does not bind is much.

- TLS proves that the peer holds a key. That the key is still where it was attested is the enclave's promise, for
  up to an hour: whoever reads a key file, or has the key of an engine that leaks it, is a peer.
- The evidence was fresh when the certificate was issued, not at the handshake. Revocation, and a later instance
  that takes the rank, count at the next issue only.
- The engine decides on the validity by its host's clock, which the operator sets.
- The engine compares roots and, as a client, the host name. As a server it takes any rank of the job, unless it
  asks ``verify_peer``. That says whom a certificate names, not who is at the other end: that is what TLS proved.
- TLS hides neither names in certificates (before 1.3) nor sizes; whether it is post-quantum is the engine's affair.

Spec: docs/spec/service.md, section 10.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

from attrs import field, frozen

from isolate.crypto import x509
from isolate.crypto.spiffe import LeafKey, dns_name
from isolate.enclave.workload import Workload
from isolate.errors import CertificateRefused, IsolateError, StorageError, UsageError
from isolate.messages.attest import ServiceCertificate
from isolate.messages.certificate import (
    LONGEST,
    Issued,
    IssueRequest,
    Trust,
    TrustBundle,
    WorkloadPeer,
    trust_domain,
)

RENEW_AT = 0.5  # of a certificate's remaining life when it is issued
RETRY, LONGEST_RETRY = 5.0, 60.0  # seconds between attempts that fail: doubled each time
KEY, CHAIN, ROOTS, BOTH = "key.pem", "certificate.pem", "roots.pem", "identity.pem"
LINK = "current"


@frozen
class Credentials:
    """A key, its certificate and the roots to trust, all PEM as TLS libraries take them.

    ``name`` is the host name that a client of this job expects of this rank (its override, where the engine
    connects by address), or None where the job has none. ``expires`` is unix seconds.
    """

    key: bytes = field(repr=False)
    certificate: bytes = field(repr=False)
    roots: bytes = field(repr=False)
    spiffe: str
    name: str | None
    expires: int
    trust: Trust = field(repr=False)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise UsageError("credentials are not copied or pickled: they are this enclave's")


def obtain(workload: Workload, *, lifetime: int = LONGEST) -> Credentials:
    """A fresh key and a certificate for it, checked before it is used:

    1. the bundle of roots is the certified service's, for our job, of now, and not simulated unless the measured
       configuration says so;
    2. the certificate is one that a peer with these roots takes: our job, our rank, our instance;
    3. it is for the key that we made.

    ``lifetime`` in seconds, 2 to 3540. Raises CertificateRefused, or the service's refusal.
    """
    key = LeafKey.generate()
    issued, service = workload.certify(IssueRequest(key.request(), lifetime))
    trust = _trust(workload, issued, service)
    job, rank = workload.slot.job, workload.slot.rank
    peer = trust.peer(issued.certificate, now=workload.now(), rank=rank, instance=workload.result.instance)
    if peer.public != key.public:
        raise CertificateRefused("this certificate is for another key", code="certificate_key")
    return Credentials(
        key=key.to_pem(),
        certificate=x509.pem(issued.certificate),
        roots=trust.pem(),
        spiffe=peer.spiffe,
        name=dns_name(trust_domain(trust.bundle.service, trust.bundle.tier), job, rank),
        expires=peer.expires,
        trust=trust,
    )


def _trust(workload: Workload, issued: Issued, service: ServiceCertificate) -> Trust:
    return TrustBundle.parse(issued.bundle).verify(
        service,
        job=workload.configuration.job,
        now=workload.now(),
        INSECURE_accept_simulated=workload.configuration.INSECURE_accept_simulated,
    )


def verify_peer(
    workload: Workload, credentials: Credentials, certificate: bytes, *, rank: int | None = None
) -> WorkloadPeer:
    """Whom a peer's certificate (DER or PEM, as the engine shows it) names: our job, ``rank`` when given, and a
    policy no older than our own. Raises CertificateRefused."""
    return credentials.trust.peer(
        certificate, now=workload.now(), rank=rank, least_sequence=workload.result.sequence
    )


class Keeper:
    """Certificates that are renewed while it is open: ``keep`` makes one.

    In ``folder``, ``current`` is a link to a folder with key.pem, certificate.pem, roots.pem, and identity.pem (key
    and certificate in one). The link is replaced by a rename; the folder before stays until the next renewal, for
    who is reading it. Whoever can read the folder has the key: it belongs on memory that only the enclave reaches.
    """

    def __init__(self, workload: Workload, folder: Path | None, lifetime: int) -> None:
        self._workload, self._folder, self._lifetime = workload, folder, lifetime
        self._stop = threading.Event()
        self._changed = threading.Condition()
        self._number = 0
        self._renew()
        self._thread = threading.Thread(target=self._run, name="certificates", daemon=True)
        self._thread.start()

    @property
    def current(self) -> Credentials:
        """The newest. It has expired when the service has not answered, or has refused, for long enough."""
        with self._changed:
            return self._current

    @property
    def number(self) -> int:
        """How many there were: 1 at first."""
        with self._changed:
            return self._number

    def wait(self, number: int, timeout: float) -> bool:
        """Wait until there were more than ``number``. Answers whether there were."""
        with self._changed:
            return self._changed.wait_for(lambda: self._number > number, timeout)

    def _renew(self) -> None:
        now = self._workload.now()
        credentials = obtain(self._workload, lifetime=self._lifetime)
        if self._folder is not None:
            write(credentials, self._folder)
        with self._changed:
            self._current = credentials
            self._due = max((credentials.expires - now) * RENEW_AT, 1.0)
            self._number += 1
            self._changed.notify_all()

    def _run(self) -> None:
        delay, failed = self._due, 0
        while not self._stop.wait(delay):
            try:
                self._renew()
                delay, failed = self._due, 0
            except IsolateError as error:
                # The engine goes on with what it has, until that ends. The operator may know why.
                self._workload.report("certificate_late", code=error.code)
                delay, failed = min(RETRY * 2**failed, LONGEST_RETRY, self._due), min(failed + 1, 8)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def keep(workload: Workload, folder: str | os.PathLike[str] | None = None, *, lifetime: int = LONGEST) -> Keeper:
    """Obtain a certificate, and renew it at half of its life until closed. ``folder`` is made, mode 0700.

    Raises what ``obtain`` and ``write`` raise, the first time; later failures are reported and tried again.
    """
    return Keeper(workload, None if folder is None else Path(folder), lifetime)


def write(credentials: Credentials, folder: str | os.PathLike[str]) -> Path:
    """Write a set of files and make ``folder/current`` name it, at once. Raises StorageError; then nothing changed.

    Answers the set's own folder. Keys are mode 0600 in folders of mode 0700.
    """
    root = Path(folder)
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix="set-", dir=root))
        try:
            _fill(made, credentials)
            # A rename onto the old link replaces it in one step; the name before that is this call's own.
            link = made / LINK
            link.symlink_to(made.name)
            before = root / LINK
            kept = {made.name, before.readlink().name if before.is_symlink() else ""}
            link.rename(before)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
        _sync(root)
        for old in root.glob("set-*"):
            if old.name not in kept:
                shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise StorageError(f"cannot write certificates to {root}: {error.strerror}") from None
    return made


def _fill(made: Path, credentials: Credentials) -> None:
    files = {
        KEY: credentials.key,
        CHAIN: credentials.certificate,
        ROOTS: credentials.roots,
        BOTH: credentials.key + credentials.certificate,
    }
    for name, content in files.items():
        descriptor = os.open(made / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    _sync(made)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
