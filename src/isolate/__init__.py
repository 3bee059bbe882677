"""isolate: keep AI data away from everyone who does not need it, on machines somebody else runs.

This list is the whole public face; a test pins it. Names are loaded when first used (PEP 562), so that an
enclave that seals a tensor loads no client, and a client no service.

    >>> import isolate
    >>> identity = isolate.Identity.generate()
    >>> str(identity.recipient).startswith("isolate-recipient-")
    True
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isolate import channel, errors, sealed
    from isolate.client import aio
    from isolate.client.handle import Handle, attach
    from isolate.client.signers import AgentSigner, FileSigner
    from isolate.crypto.kem import Identity, Recipient
    from isolate.crypto.signing import SigningKey, VerifyingKey
    from isolate.enclave.workload import Workload, join
    from isolate.sealed.directory import Epoch
    from isolate.sealed.recipients import KeyWrapper

__version__ = "0.1.0"

_PUBLIC = {
    "AgentSigner": "isolate.client.signers",
    "Epoch": "isolate.sealed.directory",
    "FileSigner": "isolate.client.signers",
    "Handle": "isolate.client.handle",
    "Identity": "isolate.crypto.kem",
    "KeyWrapper": "isolate.sealed.recipients",
    "Recipient": "isolate.crypto.kem",
    "SigningKey": "isolate.crypto.signing",
    "VerifyingKey": "isolate.crypto.signing",
    "Workload": "isolate.enclave.workload",
    "attach": "isolate.client.handle",
    "join": "isolate.enclave.workload",
}
_MODULES = {
    "aio": "isolate.client.aio",
    "channel": "isolate.channel",
    "errors": "isolate.errors",
    "sealed": "isolate.sealed",
}

__all__ = [
    "AgentSigner",
    "Epoch",
    "FileSigner",
    "Handle",
    "Identity",
    "KeyWrapper",
    "Recipient",
    "SigningKey",
    "VerifyingKey",
    "Workload",
    "aio",
    "attach",
    "channel",
    "errors",
    "join",
    "sealed",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(_MODULES[name])
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'isolate' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
