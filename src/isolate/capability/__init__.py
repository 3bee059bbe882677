"""Floor 2: capability handles: who may run which measured operation on what, how often and until when.

    >>> from isolate.capability import Invocation, Scope, Token, grant, verify, verify_invocation
    >>> from isolate.crypto.signing import SigningKey
    >>> owner, team, analyst = SigningKey.generate(), SigningKey.generate(), SigningKey.generate()
    >>> digest, binding, arguments = bytes([1]) * 32, bytes([2]) * 32, bytes([3]) * 32
    >>> scope = Scope(operations={"classify": digest}, uses=1000, expires=2_000_000_000)
    >>> token = grant(owner, asset="digits", scope=scope, holder=team.verifying_key.ed25519)
    >>> token = token.attenuate(team, Scope(uses=10), holder=analyst.verifying_key.ed25519)
    >>> seen = verify(Token.parse(token.encode()), owner.verifying_key.ed25519, now=1_900_000_000)
    >>> seen.asset, seen.scope.uses, len(seen.handles)
    ('digits', 10, 2)
    >>> call = Invocation.sign(token, analyst, operation="classify", operation_digest=digest,
    ...     argument_hash=arguments, channel_binding=binding, nonce=bytes(16), counter=1)
    >>> verify_invocation(call, seen, channel_binding=binding, argument_hash=arguments).operation
    'classify'

The format is docs/spec/capability.md. Nothing here keeps state: budgets and revocation are decided elsewhere,
on the ids in ``handles``.
"""

from isolate.capability.invocation import (
    Invocation,
    ReplayGuard,
    VerifiedInvocation,
    hash_arguments,
    verify_invocation,
)
from isolate.capability.scope import Choices, Range, Scope, meet
from isolate.capability.token import ChainCache, Token, VerifiedToken, grant, verify

__all__ = [
    "ChainCache",
    "Choices",
    "Invocation",
    "Range",
    "ReplayGuard",
    "Scope",
    "Token",
    "VerifiedInvocation",
    "VerifiedToken",
    "grant",
    "hash_arguments",
    "meet",
    "verify",
    "verify_invocation",
]
