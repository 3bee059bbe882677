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
from typing import TYPE_CHECKING, Any, NoReturn, Self

from attrs import frozen

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
from isolate.enclave import boot
from isolate.enclave.configuration import Configuration
from isolate.enclave.watch import EVERY, Watch
from isolate.errors import (
    ChannelError,
    ControlMissing,
    RefusedError,
    ReleaseRefused,
    ResultRefused,
    Tampered,
    UnavailableError,
    UsageError,
)
from isolate.messages.attest import (
    AttestAnswer,
    AttestRequest,
    Challenge,
    ChallengeRequest,
    PeerStandings,
    Registered,
    RegisterRequest,
    Release,
    ReleaseRequest,
    ServiceCertificate,
    StandingRequest,
)
from isolate.messages.base import M, Message, Signed
from isolate.messages.certificate import Issued, IssueRequest
from isolate.messages.derive import DeriveRequest
from isolate.messages.http import ask, post
from isolate.messages.invoke import Noted, Receipt, RefusalReport, Reservation, ReserveRequest, SettleRequest
from isolate.messages.lease import Lease, LeaseRequest

if TYPE_CHECKING:
    import numpy as np

    from isolate import channel
    from isolate.sealed import CompartmentKeys, PublicFacts

REACH_AFTER = 0.1  # seconds between two attempts to reach a peer
RENEW_BEFORE = 60  # seconds before a result expires
RETRY_AFTER = 5  # seconds between attempts to renew, while the service is down

# Time that also passes while the machine is suspended, where there is such a clock.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def _elapsed() -> float:
    return time.clock_gettime(_CLOCK)


@frozen
class _Standing:
    """What one attestation gave. It is replaced as a whole, so that a thread never sees half of a renewal."""

    certificate: ServiceCertificate
    slot: Slot
    result: AttestationResult
    token: str
    time: int  # by the service, signed
    since: float  # when it was asked, by our own clock

    def now(self) -> int:
        # No clock of the host is trusted: time is the service's statement, plus what has passed since we asked.
        # That is never ahead of the truth by more than the round trip.
        return self.time + int(_elapsed() - self.since)


class Workload:
    """An attested enclave. ``join`` makes it; whatever takes ``identity=`` takes it in place of an Identity."""

    def __init__(self, configuration: Configuration, service: str, rank: int, inherited: socket.socket) -> None:
        self.configuration = configuration
        self._service = service
        self._identity = Identity.generate()
        self._signing = SigningKey.generate()
        self._channel_key = Secret.generate(32)
        self._rank, self._inherited = rank, inherited
        self._attester = SimulatedAttester(inherited)
        self._public = {
            "hpke": self._identity.recipient.raw,
            "sign": self._signing.verifying_key.to_bytes(),
            "channel": CurveKey(self._channel_key).public,
        }
        self.keys = KeyDigests.of(self._public)
        self._renewing = threading.Lock()
        self._retry = 0.0
        self._watch = Watch(self._standings, now=self.now)
        self._standing = self._attest()

    def _attest(self) -> _Standing:
        asked = ChallengeRequest(secrets.token_bytes(32), self.configuration.job, self._rank)
        began = _elapsed()
        challenge = post(self._service, "challenge", asked, Challenge)
        certificate = challenge.verify(self.configuration.owner, self.configuration.lineage, asked)
        self._check_newer(certificate)
        slot = Slot(challenge.job, challenge.rank, challenge.generation)
        runtime = Runtime(
            kind="simulated",
            nonce=challenge.nonce,
            keys_digest=self.keys.digest,
            purpose=self.configuration.purpose,
            slot=slot,
        )
        evidence = self._attester.attest(runtime)
        envelope = Envelope(kind="simulated", evidence=evidence, collateral=(), runtime=runtime)
        request = AttestRequest(envelope.encode(), self._public)
        token = post(self._service, "attest", request, AttestAnswer).token
        standing = _Standing(
            certificate, slot, self._verify(token, certificate, challenge), token, challenge.time, began
        )
        if standing.result.instance != instance_id(self.keys.digest) or standing.result.slot != slot:
            raise ResultRefused("the service's result is for another instance")
        return standing

    def _check_newer(self, certificate: ServiceCertificate) -> None:
        """Never back to keys or an epoch that the owner has replaced: an old copy may still run somewhere."""
        seen: _Standing | None = getattr(self, "_standing", None)
        if seen is None:
            return
        before = seen.certificate
        if (certificate.epoch, certificate.not_before) < (before.epoch, before.not_before):
            raise ReleaseRefused(
                "this is the service as it was before its keys were renewed", code="service_superseded"
            )

    def _verify(self, token: str, certificate: ServiceCertificate, challenge: Challenge) -> AttestationResult:
        result = results.verify(
            token,
            issuer_key=certificate.result_key.ed25519,
            now=challenge.time,
            INSECURE_accept_simulated=self.configuration.INSECURE_accept_simulated,
        )
        if result.nonce != challenge.nonce or result.lineage != self.configuration.lineage:
            raise ResultRefused("the service's result is for another challenge, or of another lineage")
        return result

    def _current(self) -> _Standing:
        """The standing, renewed near its end. While the service is down, it is good to its end and no longer."""
        with self._renewing:
            standing = self._standing
            if standing.now() > standing.result.expires - RENEW_BEFORE and _elapsed() >= self._retry:
                try:
                    self._standing = self._attest()
                except UnavailableError:
                    self._retry = _elapsed() + RETRY_AFTER
                    if standing.now() >= standing.result.expires:
                        raise
            return self._standing

    @property
    def certificate(self) -> ServiceCertificate:
        """The service's keys, as the owner's root certified them."""
        return self._standing.certificate

    @property
    def result(self) -> AttestationResult:
        """What the service found of this enclave, the last time."""
        return self._standing.result

    @property
    def slot(self) -> Slot:
        """The place in the job. Each renewal takes the next generation of the same job and rank."""
        return self._standing.slot

    def token(self) -> str:
        """The result token. A result lives five minutes at most: near its end the enclave attests anew."""
        return self._current().token

    def now(self) -> int:
        """Unix seconds by the service's signed time."""
        return self._standing.now()

    def _ask(self, route: str, body: Message, answer: type[M]) -> tuple[M, _Standing]:
        """The service's signed answer, and the standing under which it was asked.

        A result that is not taken any more (another policy, other keys of the service, another epoch) is replaced
        once: whoever is still admitted goes on.
        """
        standing = self._current()
        try:
            return self._asked(standing, route, body, answer), standing
        except RefusedError as error:
            if not isinstance(error, ResultRefused) and error.code != "wrong_audience":
                raise
        with self._renewing:
            if self._standing is standing:
                self._standing = self._attest()
            standing = self._standing
        return self._asked(standing, route, body, answer), standing

    def _asked(self, standing: _Standing, route: str, body: Message, answer: type[M]) -> M:
        request = Signed.make(
            Purpose.ENCLAVE_REQUEST,
            self._signing,
            body.encode(),
            secrets.token_bytes(32),
            standing.certificate.audience,
            standing.token,
        )
        return ask(self._service, route, request, answer, standing.certificate.release_key)

    def _standings(self, instances: list[bytes]) -> PeerStandings:
        return self._ask("standing", StandingRequest(instances), PeerStandings)[0]

    def unlock(self, facts: PublicFacts) -> CompartmentKeys:
        """Have the keys of this file released to this instance.

        1. The certified service signed the release, for this request's nonce and digest, and for this instance.
        2. It names the asset and the epoch that the file itself names, and the policy of our own result.
        3. The box opens with our key under this very context, and holds a key of 32 bytes for each compartment
           that the context names; each of those is in the file.

        Raises ReleaseRefused, or the service's refusal.
        """
        request = ReleaseRequest(facts.digest, [], secrets.token_bytes(32))
        release, standing = self._ask("release", request, Release)
        context = release.verify(standing.certificate, request, standing.result.instance)
        expected = (facts.model_id, facts.epoch, standing.result.policy_id)
        if (context.asset, context.epoch, context.policy) != expected:
            raise ReleaseRefused("the release is of another asset, epoch or policy", code="release_mismatch")
        # From here on this process holds what must not leave: its errors are told by their code alone.
        boot.keep_quiet()
        with self._identity.open(release.box, info=release.context) as opened:
            keys = cbor.decode(opened.expose())
        named = set(context.compartments)
        if (
            not isinstance(keys, dict)
            or set(keys) != named
            or not named <= {"*", *facts.compartments}
            or any(type(key) is not bytes or len(key) != 32 for key in keys.values())
        ):
            raise ReleaseRefused("the release holds other keys than it says", code="release_mismatch")
        return sealed.CompartmentKeys(facts.digest, {name: Secret(key) for name, key in keys.items()})

    def recipients(self) -> list[Recipient]:
        """To whom this enclave seals: the service and the recovery recipients, as the owner certified them."""
        return self.certificate.output_recipients()

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
        return self.register(asset, self._seal(asset, tensors, epoch, metadata))

    def register(self, asset: str, facts: PublicFacts) -> Registered:
        """Register a file that this enclave sealed as the next epoch of an asset. Raises the service's refusal."""
        return self._ask("register", RegisterRequest(asset, facts.header, facts.directory), Registered)[0]

    def derive(
        self,
        asset: str,
        tensors: Mapping[str, np.ndarray[Any, Any]],
        *,
        invocation: bytes,
        metadata: Mapping[str, str],
    ) -> Registered:
        """Seal what a reserved use makes, and register it as derived (docs/spec/operations.md, 6)."""
        facts = self._seal(asset, tensors, 1, metadata)
        request = DeriveRequest(invocation, asset, facts.header, facts.directory)
        return self._ask("derive", request, Registered)[0]

    def _seal(
        self,
        asset: str,
        tensors: Mapping[str, np.ndarray[Any, Any]],
        epoch: int,
        metadata: Mapping[str, str] | None,
    ) -> PublicFacts:
        path = self.locate(asset)
        digest = sealed.save_file(
            tensors,
            path,
            recipients=self.recipients(),
            sign=self._signing,
            metadata=metadata,
            model_id=asset,
            epoch=epoch,
        )
        facts = sealed.public_facts(path)
        # The host keeps the file, and could have put another one of ours in its place.
        if facts.digest != digest:
            raise Tampered("the file that was just written is not there any more")
        return facts

    def reserve(self, request: ReserveRequest, number: bytes) -> Reservation:
        """Have a use reserved at its worst case, durably, before it runs; ``number`` is its invocation's id.

        Raises the refusal, or ReleaseRefused for a reservation that is not ours.
        """
        reservation, standing = self._ask("reserve", request, Reservation)
        reservation.verify(standing.certificate, number)
        return reservation

    def lease(self, request: LeaseRequest, number: bytes) -> Lease:
        """Have a use reserved, and more uses charged that are spent here. Raises as ``reserve`` does."""
        lease, standing = self._ask("lease", request, Lease)
        lease.verify(standing.certificate, number, request)
        return lease

    def settle(self, request: SettleRequest, number: bytes) -> Receipt:
        """Have a reserved use settled: only after this may its reply leave. Raises as ``reserve`` does."""
        if request.invocation != number:
            raise UsageError("a use is settled under its own invocation's id")
        receipt, standing = self._ask("settle", request, Receipt)
        receipt.verify(standing.certificate, request)
        return receipt

    def report_refusals(self, report: RefusalReport) -> None:
        """Have what was refused here written into the log. Raises as ``reserve`` does."""
        self._ask("refused", report, Noted)

    def certify(self, request: IssueRequest) -> tuple[Issued, ServiceCertificate]:
        """An X.509 certificate for a key of ours, not yet verified: isolate.enclave.certificates does that."""
        issued, standing = self._ask("certify", request, Issued)
        return issued, standing.certificate

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
            recheck=self._watch.recheck,
            recheck_every=EVERY,
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
        """Connect to the peer of this rank, where the host said (ISOLATE_PEER).

        A peer that does not listen yet is tried again for ``timeout`` seconds: enclaves of one job start in any
        order. A peer that is there and refused is not.
        """
        from isolate import channel

        end = time.monotonic() + timeout
        while True:
            try:
                return channel.connect(
                    _environment("ISOLATE_PEER"),
                    identity=self.attested(),
                    expect=self.expect(rank),
                    profile="peer",
                    purpose=purpose,
                    timeout=timeout,
                )
            # A courier accepts, finds nobody behind it, and hangs up: the peer is gone before it was there.
            except (UnavailableError, ChannelError) as error:
                absent = isinstance(error, UnavailableError) or error.code == "peer_gone"
                if not absent or time.monotonic() > end:
                    raise
                time.sleep(REACH_AFTER)

    def report(self, name: str, **facts: Any) -> None:
        """Print a public event: the operator reads it. Never data."""
        boot.event(name, **facts)

    def close(self) -> None:
        self._inherited.close()
        self._channel_key.wipe()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise UsageError("a workload is not copied or pickled: it is this enclave's")

    def __repr__(self) -> str:
        return f"Workload({self.slot.job!r}, rank {self.slot.rank}, instance {self.result.instance.hex()[:16]})"


def _environment(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise UsageError(f"the launcher did not set {name}")
    return value


def _number(name: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise UsageError(f"{name} is no number")
    return int(text)


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
    number = rank if rank is not None else _number("ISOLATE_RANK", os.environ.get("ISOLATE_RANK", "0"))
    try:
        inherited = socket.socket(fileno=_number("ISOLATE_ATTEST_FD", _environment("ISOLATE_ATTEST_FD")))
    except OSError:
        raise ControlMissing("the launcher left no socket to the platform") from None
    return Workload(configuration, address, number, inherited)
