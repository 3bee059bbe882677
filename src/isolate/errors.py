"""Every error that leaves the library, in one tree.

    IsolateError
    ├── UsageError                  the caller's mistake; nothing was attempted           (exit 2)
    │   └── KeyFormatError          a key, recipient or key file that cannot be read
    ├── RefusedError                what was presented is not to be trusted, or not allowed (exit 1)
    │   ├── MalformedError          bytes that break their specification
    │   ├── SealedError             a sealed file that is not what it must be
    │   │   ├── NotSealed           no sealed file at all (a plain safetensors file, say)
    │   │   ├── Tampered            a tag, digest or signature does not match
    │   │   ├── Truncated           shorter or longer than its directory says
    │   │   ├── NoRecipient         no stanza opens with this identity
    │   │   ├── UnauthenticatedOrigin   nothing says who sealed it, or the wrong one did
    │   │   └── RolledBack          older than the epoch, or another digest than expected
    │   ├── KeyServiceRefused       a KMS or HSM does not allow it: credentials, PIN, or the key's own policy
    │   ├── EvidenceRefused         evidence that is not authentic
    │   ├── PolicyRefused           a policy that is malformed, another's, or older than one seen before
    │   ├── AppraisalRefused        authentic evidence that the policy does not admit
    │   ├── ResultRefused           a result token that is forged, stale or for somebody else
    │   ├── ReleaseRefused          a key release that the service or the enclave does not accept
    │   ├── CertificateRefused      a workload's certificate, or the roots for it, that is not to be trusted
    │   ├── CapabilityRefused       a token, invocation or operation outside its limits
    │   │   ├── ScopeExceeded       the operation is not in the effective scope
    │   │   ├── HolderRefused       no proof by the holder of the token's last key
    │   │   ├── BudgetExhausted     a limit of this handle or of an ancestor is spent
    │   │   ├── Revoked             this handle, or an ancestor, was revoked
    │   │   └── OutputRefused       an output that is not of the operation's declared, closed type
    │   └── LogRefused              a proof, checkpoint or signature of the log does not verify
    ├── ChannelError                the other end of a channel, or who is between, misbehaved
    │   ├── HandshakeRefused        the peer is not whom the pins name
    │   ├── RecordRefused           a record that does not authenticate; the channel is over
    │   ├── ChannelTruncated        the transport ended without an authenticated close
    │   ├── ChannelClosed           used after its end
    │   ├── ChannelTimeout          nothing in time
    │   └── RankFailed              a rank of a process group is gone, hostile, or in another collective
    └── UnavailableError            this machine, its disk or a service cannot do it now
        ├── ServiceUnavailable      the attestation service does not answer
        ├── KeyServiceUnavailable   a KMS or HSM does not answer in time, or cannot
        ├── StorageError            reading or writing failed; nothing half-written is left
        ├── ControlMissing          a protection that the policy asks for is not to be had here
        └── MissingExtra            an optional dependency is not installed

Every error has ``code`` (stable, snake case: the only thing a peer is told), ``hint`` (what to do next) and,
when a service made it, ``request_id``. No message carries a secret, plaintext or a foreign exception's text.

    >>> from isolate.errors import RefusedError, ScopeExceeded
    >>> issubclass(ScopeExceeded, RefusedError), ScopeExceeded("no").code
    (True, 'scope_exceeded')
"""

from __future__ import annotations

from typing import Any, ClassVar


class IsolateError(Exception):
    """The root of the tree.

    ``str(error)`` is one line: the cause, and after it the hint where there is one.
    """

    default_code: ClassVar[str] = "error"
    default_hint: ClassVar[str] = ""

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        hint: str | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.hint = self.default_hint if hint is None else hint
        self.request_id = request_id
        # Which checks this came of, for the owner to ask about later (isolate.service.explain): sent to nobody.
        self.checks: tuple[Any, ...] = ()

    def __str__(self) -> str:
        text = self.message
        if self.hint:
            text = f"{text} ({self.hint})"
        if self.request_id:
            text = f"{text} [request {self.request_id}]"
        return text


class UsageError(IsolateError):
    default_code = "usage"


class KeyFormatError(UsageError):
    default_code = "key_format"
    default_hint = "make one with `isolate keygen`"


class RefusedError(IsolateError):
    default_code = "refused"


class MalformedError(RefusedError):
    default_code = "malformed"


class SealedError(RefusedError):
    default_code = "sealed_refused"


class NotSealed(SealedError):
    default_code = "not_sealed"
    default_hint = "seal it first with `isolate seal`"


class Tampered(SealedError):
    default_code = "tampered"


class Truncated(SealedError):
    default_code = "truncated"


class NoRecipient(SealedError):
    default_code = "no_recipient"
    default_hint = "use an identity that the file was sealed to"


class UnauthenticatedOrigin(SealedError):
    default_code = "unauthenticated_origin"
    default_hint = "name who must have sealed it with signed_by=, or its digest with expect="


class RolledBack(SealedError):
    default_code = "rolled_back"


class KeyServiceRefused(RefusedError):
    default_code = "key_service_refused"


class EvidenceRefused(RefusedError):
    default_code = "evidence_refused"


class PolicyRefused(RefusedError):
    default_code = "policy_refused"


class AppraisalRefused(RefusedError):
    default_code = "appraisal_refused"


class ResultRefused(RefusedError):
    default_code = "result_refused"


class ReleaseRefused(RefusedError):
    default_code = "release_refused"


class CertificateRefused(RefusedError):
    default_code = "certificate_refused"


class CapabilityRefused(RefusedError):
    default_code = "capability_refused"


class ScopeExceeded(CapabilityRefused):
    default_code = "scope_exceeded"


class HolderRefused(CapabilityRefused):
    default_code = "holder_refused"


class BudgetExhausted(CapabilityRefused):
    default_code = "budget_exhausted"


class Revoked(CapabilityRefused):
    default_code = "revoked"


class OutputRefused(CapabilityRefused):
    default_code = "output_refused"


class LogRefused(RefusedError):
    default_code = "log_refused"


class ChannelError(IsolateError):
    default_code = "channel_error"


class HandshakeRefused(ChannelError):
    default_code = "handshake_refused"


class RecordRefused(ChannelError):
    default_code = "record_refused"


class ChannelTruncated(ChannelError):
    default_code = "channel_truncated"


class ChannelClosed(ChannelError):
    default_code = "channel_closed"


class ChannelTimeout(ChannelError):
    default_code = "channel_timeout"


class RankFailed(ChannelError, RuntimeError):
    """Ends a process group on every rank. ``rank``: which one failed, by its global rank; None when unknown.

    A RuntimeError too, since code around torch.distributed expects one.
    """

    default_code = "rank_failed"

    def __init__(self, message: str, *, rank: int | None = None, code: str | None = None, hint: str | None = None):
        super().__init__(message, code=code, hint=hint)
        self.rank = rank


class UnavailableError(IsolateError):
    default_code = "unavailable"


class ServiceUnavailable(UnavailableError):
    default_code = "service_unavailable"
    default_hint = "is the attestation service running, and is this its address?"


class KeyServiceUnavailable(UnavailableError):
    default_code = "key_service_unavailable"


class StorageError(UnavailableError):
    default_code = "storage"


class ControlMissing(UnavailableError):
    default_code = "control_missing"


class MissingExtra(UnavailableError):
    default_code = "missing_extra"
