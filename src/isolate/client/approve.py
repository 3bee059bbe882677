"""Approving an export of plaintext, offline, and fetching it with enough approvals.

    >>> from isolate.crypto.kem import Identity
    >>> from isolate.crypto.signing import SigningKey
    >>> wish = Wish("demo/1", "digits", bytes(32), Identity.generate().recipient.raw, "yearly archive")
    >>> text = approve_export(wish, SigningKey.generate(), lifetime=3600)
    >>> read_approval(text).reason
    'yearly archive'

Mode: this is neither workload nor handle mode: it is the one way in which the service itself lets plaintext go, and
it takes several people (docs/spec/service.md, 6.5). Nothing here needs the owner's root key but naming the group.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from isolate import sealed
from isolate.client.connect import certificate, now
from isolate.crypto import cbor
from isolate.crypto.kem import Identity
from isolate.crypto.secret import Secret
from isolate.crypto.signing import Signer, VerifyingKey
from isolate.errors import ReleaseRefused, UsageError
from isolate.messages.approve import Approval, Approvers, Export, ExportRequest, GroupApproval, Wish
from isolate.messages.attest import ServiceCertificate
from isolate.messages.http import post

LIFETIME = 24 * 3600  # seconds that an approval is good for, when nothing else is said

__all__ = ["Exporter", "Wish", "approve_export", "approve_group", "read_approval", "read_group_approval"]


def approve_export(wish: Wish, signer: Signer, *, lifetime: int = LIFETIME) -> str:
    """One approval as a line of text, good for ``lifetime`` seconds from now. Raises MalformedError."""
    made = Approval.make(wish, signer, not_after=now() + lifetime, nonce=secrets.token_bytes(32))
    return made.to_text()


def approve_group(
    keys: Sequence[VerifyingKey],
    threshold: int,
    signer: Signer,
    *,
    service: str,
    sequence: int,
    lifetime: int = LIFETIME,
) -> str:
    """A present approver's word for the group that follows, as a line of text.

    ``service`` is its name and epoch, ``sequence`` the number of the new group. Raises MalformedError.
    """
    group = Approvers(threshold, [key.to_bytes() for key in keys])
    made = GroupApproval.make(group, signer, service=service, sequence=sequence, not_after=now() + lifetime)
    return made.to_text()


def read_approval(text: str) -> Approval:
    """What ``approve_export`` made. Raises MalformedError or KeyFormatError."""
    return Approval.from_text(text)


def read_group_approval(text: str) -> GroupApproval:
    """What ``approve_group`` made: ``Owner.set_approvers`` takes it. Raises MalformedError or KeyFormatError."""
    return GroupApproval.from_text(text)


class Exporter:
    """Asks a service for the keys of one file, with approvals. Pass it as ``identity=`` to sealed.unseal_file.

    ``destination`` is the identity whose recipient the approvals name. Asking uses the approvals up, so whatever
    can be checked is checked before.
    """

    def __init__(
        self,
        approvals: Sequence[Approval],
        destination: Identity,
        *,
        service: str,
        owner: VerifyingKey,
        lineage: str,
    ) -> None:
        if not approvals:
            raise UsageError("an export takes approvals", hint="make them with `isolate approve`")
        self._wish = approvals[0].wish
        if any(one.wish != self._wish for one in approvals):
            raise UsageError("these approvals are for different things")
        if destination.recipient.raw != self._wish.destination:
            raise UsageError("the approvals are for another destination than this identity")
        self._approvals, self._destination = list(approvals), destination
        self._service, self._owner, self._lineage = service, owner, lineage

    def unlock(self, facts: sealed.PublicFacts) -> sealed.CompartmentKeys:
        """The keys of this file. Raises UsageError for a file that was not approved, RefusedError."""
        wish = self._wish
        if (facts.digest, facts.model_id) != (wish.digest, wish.asset):
            raise UsageError("the approvals are for another file")
        found = certificate(self._service, self._owner, self._lineage)
        request = ExportRequest(
            wish.asset, wish.digest, wish.destination, wish.reason, secrets.token_bytes(32),
            [one.encode() for one in self._approvals],
        )  # fmt: skip
        answer = post(self._service, "export", request, Export)
        return self._opened(answer, found, request, facts)

    def _opened(
        self, answer: Export, found: ServiceCertificate, request: ExportRequest, facts: sealed.PublicFacts
    ) -> sealed.CompartmentKeys:
        context = answer.verify(found, request)
        with self._destination.open(answer.box, info=answer.context) as opened:
            keys = cbor.decode(bytes(opened.expose()))
        if (
            not isinstance(keys, dict)
            or keys.keys() != set(context.compartments)
            or any(type(key) is not bytes or len(key) != 32 for key in keys.values())
        ):
            raise ReleaseRefused("the export holds other keys than it says", code="release_mismatch")
        return sealed.CompartmentKeys(facts.digest, {name: Secret(key) for name, key in keys.items()})
