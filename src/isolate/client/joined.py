"""Using handles on several assets in one operation: each is asked, each is charged, and the strictest limits hold.

    answer = invoke_joined(survey, "compare", {"register": register}, year=1996)

``compare`` is an operation on the asset of ``survey`` that declares an argument ``register`` of type Joined, for
the asset of the other handle; both handles must name the operation. Spec: docs/spec/operations.md, 7.

    >>> invoke_joined(None, "compare", {})
    Traceback (most recent call last):
    ...
    isolate.errors.UsageError: without a second handle this is an ordinary invocation
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from isolate.capability.invocation import Invocation, hash_arguments
from isolate.client.boundary import bare
from isolate.client.handle import Handle
from isolate.client.held import Held
from isolate.crypto import cbor
from isolate.errors import UsageError


@bare
def invoke_joined(handle: Handle, operation: str, joined: Mapping[str, Held], /, **arguments: Any) -> Any:
    """Run an operation of ``handle`` with other handles as arguments, by the name of the argument.

    Raises the typed refusal with its code and request id, a ChannelError, or UsageError.
    """
    if not joined:
        raise UsageError("without a second handle this is an ordinary invocation")
    if not joined.keys().isdisjoint(arguments):
        raise UsageError("an argument is given twice")
    digest = handle._digest(operation)
    encoded, hashed = handle._encode(arguments)
    with handle._turn:
        try:
            opened = handle._connect()
            whole = dict(encoded)
            # The first handle's own invocation covers the others, and is counted before them.
            for number, (name, other) in enumerate(sorted(joined.items()), handle._counter + 2):
                invocation = Invocation.sign(
                    other._token,
                    other._signer,
                    operation=operation,
                    operation_digest=other._digest(operation),
                    argument_hash=hashed,
                    channel_binding=opened.binding,
                    nonce=secrets.token_bytes(16),
                    counter=number,
                )
                whole[name] = {"token": other._token.encode(), "invocation": invocation.encode()}
            request = handle._request(operation, digest, whole, hash_arguments(cbor.encode(whole)), opened.binding)
            handle._counter += len(joined)
            opened.send(request)
            reply = handle._reply(opened.recv())
        except BaseException:
            # As in Handle: this channel is over, or has a reply still to come.
            handle.close()
            raise
    return handle._value(operation, reply)
