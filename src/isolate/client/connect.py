"""Finding out whom one talks to: the service's certificate, and the pins on an enclave.

>>> certificate("unix:/nonexistent.sock", None, "demo")  # doctest: +ELLIPSIS
Traceback (most recent call last):
...
isolate.errors.ServiceUnavailable: no answer from unix:/nonexistent.sock: FileNotFoundError (...)
"""

from __future__ import annotations

import time

from isolate.channel import Expect
from isolate.crypto.signing import VerifyingKey
from isolate.errors import ReleaseRefused
from isolate.messages.attest import CertificateRequest, ServiceCertificate
from isolate.messages.http import post


def now() -> int:
    """Unix seconds. A client trusts its own clock; an enclave never does."""
    return int(time.time())


def certificate(service: str, owner: VerifyingKey, lineage: str) -> ServiceCertificate:
    """The certificate of the service at this address, once the owner's root vouches for it, now.

    Raises ServiceUnavailable or ReleaseRefused.
    """
    found = post(service, "certificate", CertificateRequest(), ServiceCertificate).verify(owner, lineage)
    if not found.valid_at(now()):
        raise ReleaseRefused("the service's certificate is not valid now", code="service_expired")
    return found


def expect_enclave(
    found: ServiceCertificate, *, job: str, least_sequence: int, INSECURE_accept_simulated: bool
) -> Expect:
    """The pins on an enclave of this job, whatever its rank, attested by the service of this certificate."""
    return Expect(
        job=job,
        rank=None,
        instance=None,
        issuer_key=found.result_key.ed25519,
        clock=now,
        lineage=found.lineage,
        least_sequence=least_sequence,
        INSECURE_accept_simulated=INSECURE_accept_simulated,
    )
