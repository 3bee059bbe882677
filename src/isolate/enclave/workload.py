"""``isolate.join``: attest this enclave, and hold in one object what that gives it.

    with isolate.join() as workload:                      # inside an enclave
        weights = isolate.sealed.load_file("model.sealed", identity=workload, signed_by=owner)
        workload.seal("digits/model", trained, epoch=1)

    >>> import isolate
    >>> isolate.join()
    Traceback (most recent call last):
    ...
    isolate.errors.ControlMissing: this process was not launched as an enclave (start it with `isolate launch ...`)

Mode: workload (docs/spec/service.md): the measured code sees plaintext; the operator does not.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from isolate import sealed
from isolate.attestation import result as results
from isolate.attestation.attesters.simulated import SimulatedAttester
from isolate.attestation.evidence import Envelope, KeyDigests, Runtime, Slot, instance_id
from isolate.attestation.result import AttestationResult
from isolate.crypto import cbor
from isolate.crypto.exchange import CurveKey
from isolate.crypto.kem import Identity, Recipient
from isolate.crypto.secret import Secret
from isolate.crypto.signing import Purpose, SigningKey
from isolate.enclave.boot import event
from isolate.enclave.configuration import Configuration
from isolate.errors import ReleaseRefused, ResultRefused, UsageError
from isolate.messages.attest import (
    AttestAnswer,
    AttestRequest,
    Challenge,
    ChallengeRequest,
    Registered,
    RegisterRequest,
    Release,
    ReleaseContext,
    ReleaseRequest,
    ServiceCertificate,
)
from isolate.messages.base import Message, Signed
from isolate.messages.http import post
from isolate.messages.invoke import ChargeRequest, Receipt

if TYPE_CHECKING:
    import numpy as np

    from isolate import channel
    from isolate.sealed import CompartmentKeys, PublicFacts

RENEW_BEFORE = 60  # seconds before a result expires


class Workload:
    """An attested enclave. ``join`` makes it; whatever takes ``identity=`` takes it in place of an Identity."""

    def __init__(self, configuration: Configuration, service: str, rank: int, inherited: socket.socket) -> None:
        self.configuration = configuration
        self._service = service
        self._identity = Identity.generate()
        self._signing = SigningKey.generate()
        self._channel_key = Secret.generate(32)
        self._contexts: dict[bytes, ReleaseContext] = {}
        self._rank, self._inherited = rank, inherited
        self._attester = SimulatedAttester(inherited)
        self._public = {
            "hpke": self._identity.recipient.raw,
            "sign": self._signing.verifying_key.to_bytes(),
            "channel": CurveKey(self._channel_key).public,
        }
        self.keys = KeyDigests.of(self._public)
        self._renewing = threading.Lock()
        self._attest()

    def _attest(self) -> None:
        asked = ChallengeRequest(secrets.token_bytes(32), self.configuration.job, self._rank)
        began = time.monotonic()
        challenge = post(self._service, "challenge", asked, Challenge)
        self.certificate: ServiceCertificate = challenge.verify(
            self.configuration.owner, self.configuration.lineage, asked
        )
        # No clock of the host is trusted: time is the service's signed statement, plus what has passed since we
        # asked. That is never ahead of the truth by more than the round trip.
        self._time, self._since = challenge.time, began
        self.slot = Slot(challenge.job, challenge.rank, challenge.generation)
        runtime = Runtime(
            kind="simulated",
            nonce=challenge.nonce,
            keys_digest=self.keys.digest,
            purpose=self.configuration.purpose,
            slot=self.slot,
        )
        evidence = self._attester.attest(runtime)
        envelope = Envelope(kind="simulated", evidence=evidence, collateral=(), runtime=runtime)
        request = AttestRequest(envelope.encode(), self._public)
        self._token = post(self._service, "attest", request, AttestAnswer).token
        self.result: AttestationResult = results.verify(
            self._token,
            issuer_key=self.certificate.result_key.ed25519,
            now=self.now(),
            INSECURE_accept_simulated=self.configuration.INSECURE_accept_simulated,
        )
        if self.result.instance != instance_id(self.keys.digest) or self.result.slot != self.slot:
            raise ResultRefused("the service's result is for another instance")

    def token(self) -> str:
        """The result token. A result lives five minutes at most: near its end the enclave attests anew."""
        with self._renewing:
            if self.now() > self.result.expires - RENEW_BEFORE:
                self._attest()
            return self._token

    def now(self) -> int:
        """Unix seconds by the service's signed time."""
        return self._time + int(time.monotonic() - self._since)

    def _ask(self, route: str, body: Message, answer: type[Any]) -> Any:
        request = Signed.make(
            Purpose.ENCLAVE_REQUEST,
            self._signing,
            body.encode(),
            secrets.token_bytes(32),
            self.certificate.name,
            self.token(),
        )
        return post(self._service, route, request, answer)

    def unlock(self, facts: PublicFacts) -> CompartmentKeys:
        """Have the keys of this file released to this instance. Raises ReleaseRefused or the service's refusal."""
        request = ReleaseRequest(facts.digest, [], secrets.token_bytes(32))
        release: Release = self._ask("release", request, Release)
        context = release.verify(self.certificate, request, self.result.instance)
        with self._identity.open(release.box, info=release.context) as opened:
            keys = cbor.decode(opened.expose())
        if not isinstance(keys, dict) or sorted(keys) != context.compartments:
            raise ReleaseRefused("the release holds other keys than it says", code="release_mismatch")
        self._contexts[facts.digest] = context
        return sealed.CompartmentKeys(facts.digest, {name: Secret(key) for name, key in keys.items()})

    def recipients(self) -> list[Recipient]:
        """To whom this enclave seals: as its last release says. Raises UsageError before one."""
        if not self._contexts:
            raise UsageError("open a released file first: its release says whom to seal to")
        return [Recipient(raw) for raw in list(self._contexts.values())[-1].recipients]

    def locate(self, asset: str) -> Path:
        """Where the host keeps the sealed file of an asset: a place, no promise about what lies there."""
        return Path(_environment("ISOLATE_ASSETS"), asset.replace("/", "-") + ".sealed")

    def seal(
        self,
        asset: str,
        tensors: Mapping[str, np.ndarray[Any, Any]],
        *,
        epoch: int,
        metadata: Mapping[str, str] | None = None,
    ) -> Registered:
        """Seal tensors as the next epoch of an asset, and register them. ``epoch`` is higher than the last."""
        path = self.locate(asset)
        sealed.save_file(
            tensors,
            path,
            recipients=self.recipients(),
            sign=self._signing,
            metadata=metadata,
            model_id=asset,
            epoch=epoch,
        )
        facts = sealed.public_facts(path)
        registered: Registered = self._ask(
            "register", RegisterRequest(asset, facts.header, facts.directory), Registered
        )
        return registered

    def charge(self, request: ChargeRequest, number: bytes) -> Receipt:
        """Have a use charged, durably. Raises the refusal, or ReleaseRefused for a receipt that is not ours."""
        receipt: Receipt = self._ask("charge", request, Receipt)
        receipt.verify(self.certificate, number)
        return receipt

    def attested(self) -> channel.Attested:
        """What this enclave shows at the beginning of a channel."""
        from isolate import channel

        return channel.Attested(token=self.token, keys=self.keys, static=self._channel_key, sign=self._signing)

    def expect(self, rank: int | None) -> channel.Expect:
        """The pins on a peer: same job, this rank, attested under the same lineage, by the certified service."""
        from isolate import channel

        return channel.Expect(
            job=self.configuration.job,
            rank=rank,
            instance=None,
            issuer_key=self.certificate.result_key.ed25519,
            clock=self.now,
            lineage=self.configuration.lineage,
            least_sequence=self.result.sequence,
            INSECURE_accept_simulated=self.configuration.INSECURE_accept_simulated,
        )

    def listen(
        self, purpose: str, *, rank: int | None, profile: str = "peer", timeout: float = 60.0
    ) -> channel.Listener:
        """Listen where the host said (ISOLATE_LISTEN). ``rank``: the only peer that is let in."""
        from isolate import channel

        return channel.listen(
            _environment("ISOLATE_LISTEN"),
            identity=self.attested(),
            expect=self.expect(rank) if profile == "peer" else None,
            profile=profile,
            purpose=purpose,
            timeout=timeout,
        )

    def connect(self, purpose: str, *, rank: int, timeout: float = 60.0) -> channel.Channel:
        """Connect to the peer of this rank, where the host said (ISOLATE_PEER)."""
        from isolate import channel

        return channel.connect(
            _environment("ISOLATE_PEER"),
            identity=self.attested(),
            expect=self.expect(rank),
            profile="peer",
            purpose=purpose,
            timeout=timeout,
        )

    def report(self, name: str, **facts: Any) -> None:
        """Print a public event: the operator reads it. Never data."""
        event(name, **facts)

    def close(self) -> None:
        self._inherited.close()
        self._channel_key.wipe()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Workload({self.slot.job!r}, rank {self.slot.rank}, instance {self.result.instance.hex()[:16]})"


def _environment(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise UsageError(f"the launcher did not set {name}")
    return value


def join(service: str | None = None, *, job: str | None = None, rank: int | None = None) -> Workload:
    """Attest this enclave to the owner's service, and be given its slot.

    ``service`` (an address) and ``rank`` come from the launcher when not given. ``job`` may only repeat what the
    measured configuration says. Raises ControlMissing outside an enclave, AppraisalRefused with the check that
    failed, ReleaseRefused when the service is not certified by the owner's root, ServiceUnavailable.
    """
    configuration = Configuration.of_this_enclave()
    if job is not None and job != configuration.job:
        raise UsageError(f"this enclave's measured configuration is for the job {configuration.job!r}")
    address = service or _environment("ISOLATE_SERVICE")
    number = rank if rank is not None else int(os.environ.get("ISOLATE_RANK", "0"))
    inherited = socket.socket(fileno=int(_environment("ISOLATE_ATTEST_FD")))
    return Workload(configuration, address, number, inherited)
