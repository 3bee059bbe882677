"""The owner's side of a service: policy, rules, assets, grants, revocation, audit.

    >>> from isolate.crypto.signing import SigningKey
    >>> owner = Owner(SigningKey.generate(), service="unix:/run/isolate.sock", lineage="demo")
    >>> owner
    Owner('demo', unix:/run/isolate.sock)

Every request is signed by the owner's root key for this service, and taken once; every answer is signed by the
service, so that nobody in between suppresses a revocation or shows an old file as the newest.
Spec: docs/spec/service.md.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from isolate import sealed
from isolate.attestation.policy import Policy, SignedPolicy
from isolate.capability.scope import Constraint, Scope
from isolate.capability.token import grant
from isolate.client.connect import certificate
from isolate.client.entries import LogEntry, read
from isolate.client.handle import HandleFile
from isolate.crypto.signing import Purpose, SigningKey, VerifyingKey
from isolate.messages.approve import GroupApproval, GroupSet, SetApprovers
from isolate.messages.attest import Registered, RegisterRequest, ServiceCertificate
from isolate.messages.base import Message, Signed
from isolate.messages.http import ask, fetch, post
from isolate.messages.limits import AssetLimits
from isolate.messages.owner import (
    AssetRequest,
    AssetRule,
    Done,
    Entries,
    Evidence,
    EvidenceRequest,
    ExplainRequest,
    Explanation,
    LogAnswer,
    LogRequest,
    PolicyUpdate,
    Revoke,
    Rollback,
)


class Owner:
    """``key``: the root signing key. ``service``: an address. ``lineage``: of the policies it signs."""

    def __init__(self, key: SigningKey, *, service: str, lineage: str) -> None:
        self._key = key
        self._service = service
        self._lineage = lineage
        self._certificate: ServiceCertificate | None = None

    def __repr__(self) -> str:
        return f"Owner({self._lineage!r}, {self._service})"

    @property
    def certificate(self) -> ServiceCertificate:
        """The service's keys, once they verify under the owner's root."""
        if self._certificate is None:
            self._certificate = certificate(self._service, self._key.verifying_key, self._lineage)
        return self._certificate

    def _ask(self, route: str, body: Message, answer: type[Any]) -> Any:
        request = Signed.make(
            Purpose.OWNER_REQUEST, self._key, body.encode(), secrets.token_bytes(32), self.certificate.audience
        )
        return ask(self._service, f"owner/{route}", request, answer, self.certificate.release_key)

    def set_policy(self, policy: Policy) -> int:
        """Put a policy into force; its sequence is higher than the last. Answers its place in the log."""
        signed = SignedPolicy.sign(policy, self._key)
        done: Done = self._ask("policy", PolicyUpdate(signed.encode()), Done)
        return done.log_index

    def set_rule(self, asset: str, *, readers: Sequence[str] = (), writers: Sequence[str] = ()) -> int:
        """Say which measurements, by their names in the policy, may read and write an asset."""
        done: Done = self._ask("rule", AssetRule(asset, list(readers), list(writers)), Done)
        return done.log_index

    def register(self, path: str | os.PathLike[str]) -> Registered:
        """Give the service a sealed file's public part: from now on this is the newest epoch of its asset."""
        facts = sealed.public_facts(path)
        registered: Registered = self._ask(
            "register", RegisterRequest(facts.model_id, facts.header, facts.directory), Registered
        )
        return registered

    def grant(
        self,
        asset: str,
        *,
        operations: Mapping[str, bytes],
        holder: bytes,
        enclave: str,
        job: str,
        uses: int | None = None,
        bytes_out: int | None = None,
        rates: Mapping[int, int] | None = None,
        parameters: Mapping[str, Mapping[str, Constraint]] | None = None,
        outputs: Mapping[str, tuple[int, ...]] | None = None,
        minimum_group: int | None = None,
        not_before: int | None = None,
        expires: int | None = None,
        depth: int | None = None,
        lease: int | None = None,
        epoch: int | None = None,
        INSECURE_accept_simulated: bool = False,
    ) -> HandleFile:
        """A handle for ``holder`` (Ed25519, 32 bytes) on an asset that the enclaves of ``job`` serve.

        ``operations`` maps names to digests; ``enclave`` is the address where they are invoked. The limits are
        those of a Scope (docs/spec/capability.md, 2): uses and bytes in all, uses in a window of so many seconds,
        Range or Choices of arguments, kinds and sizes of results, people behind an aggregate, Unix seconds, and
        how often it may be passed on. A limit that is None is none. ``lease`` lets enclaves take so many uses at
        once, and notice a revocation up to a minute late (docs/handles.md); without it there are no leases.
        ``epoch`` is the service's, who is asked for it when it is not given: the rest is made offline. Raises
        UsageError.
        """
        scope = Scope(
            operations=operations, parameters=parameters, outputs=outputs, uses=uses, bytes_out=bytes_out,
            rates=rates, minimum_group=minimum_group, not_before=not_before, expires=expires, depth=depth,
            lease=lease,
        )  # fmt: skip
        return HandleFile(
            token=grant(
                self._key,
                asset=asset,
                scope=scope,
                holder=holder,
                epoch=self.certificate.epoch if epoch is None else epoch,
            ).to_text(),
            owner=str(self._key.verifying_key),
            lineage=self._lineage,
            service=self._service,
            enclave=enclave,
            job=job,
            INSECURE_accept_simulated=INSECURE_accept_simulated,
        )

    def newest(self, asset: str) -> Registered:
        """The file of an asset that is in force: its digest is what ``expect=`` takes."""
        registered: Registered = self._ask("asset", AssetRequest(asset), Registered)
        return registered

    def rollback(self, asset: str, digest: bytes, *, facts: sealed.PublicFacts | None = None) -> Registered:
        """Put an earlier file of an asset back into force, by its digest (32 bytes).

        ``facts``: of the file itself, where the service does not know it, as after a recovery from an old copy.
        """
        parts = (facts.header, facts.directory) if facts else (b"", b"")
        registered: Registered = self._ask("rollback", Rollback(asset, digest, *parts), Registered)
        return registered

    def explain(self, request_id: str) -> Explanation:
        """Why the request with this id was refused: each check, with what was expected and found."""
        explanation: Explanation = self._ask("explain", ExplainRequest(request_id), Explanation)
        return explanation

    def set_limits(
        self,
        asset: str,
        *,
        uses: int | None = None,
        bytes_out: int | None = None,
        holder_uses: int | None = None,
        holder_bytes: int | None = None,
    ) -> int:
        """What all holders of an asset, and each of them, may take from it over its life, in place of what was
        said before. A limit that is None is none."""
        limits = AssetLimits(asset, uses, bytes_out, holder_uses, holder_bytes)
        done: Done = self._ask("limits", limits, Done)
        return done.log_index

    def set_approvers(
        self, keys: Sequence[VerifyingKey], threshold: int, *, approvals: Sequence[GroupApproval] = ()
    ) -> GroupSet:
        """Name who approves exports of plaintext, ``threshold`` (2 or more) of them each time.

        Once there is a group, the next takes as many of its members' approvals
        (``isolate.client.approve.approve_group``). Raises RefusedError (``approvals_missing``, ...).
        """
        encoded = [one.encode() for one in approvals]
        request = SetApprovers(threshold, [key.to_bytes() for key in keys], encoded)
        done: GroupSet = self._ask("approvers", request, GroupSet)
        return done

    def revoke(self, handle: bytes) -> int:
        """End the handle with this id (32 bytes), and everything narrowed from it."""
        done: Done = self._ask("revoke", Revoke(handle), Done)
        return done.log_index

    def evidence(self, instance: bytes) -> bytes:
        """The recorded envelope of an instance."""
        answer: Evidence = self._ask("evidence", EvidenceRequest(instance), Evidence)
        return answer.envelope

    def entries(self, start: int = 0) -> Iterator[LogEntry]:
        """The log from this entry on, with the details that others see only a hash of: who used what, and what was
        refused. Each is found in the public log. Raises LogRefused where the service tells something else."""
        return read(
            lambda request: self._ask("entries", request, Entries),
            lambda path, most: fetch(self._service, f"/log/{path}", most=most),
            self.certificate,
            start,
        )

    def log(self, *, old_size: int = 0, index: int | None = None) -> LogAnswer:
        """A checkpoint and proofs, not yet verified (isolate.transparency does that)."""
        return post(self._service, "log", LogRequest(old_size, index), LogAnswer)
