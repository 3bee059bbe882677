"""The vendors' root certificates, pinned: the files lie here, their SHA-256 fingerprints stand in this table.

    >>> from isolate.attestation.roots import PINNED, root
    >>> len(root("aws-nitro-g1")) > 500, len(PINNED["sev-snp"])
    (True, 3)

README.md in this directory says where each file is from. A file that does not have its fingerprint is refused, so
that the table alone decides. The simulated platform has no root here, and never will.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import resources

from isolate.crypto import x509
from isolate.errors import StorageError

FINGERPRINTS = {
    "aws-nitro-g1": "641a0321a3e244efe456463195d606317ed7cdcc3c1756e09893f3c68f79bb5b",
    "amd-ark-milan": "69d063b45344d26a2e94e1f4210de49ef555308287d4c174445c95639a540bcd",
    "amd-ark-genoa": "4c6598d19c18719c5dfd4a7d335f674e5bfe1d8f800cea2cf270c10d103db2f1",
    "amd-ark-turin": "1f084161a44bb6d93778a904877d4819cafa5d05ef4193b2ded9dd9c73dd3f6a",
    "intel-sgx-root": "44a0196b2b99f889b8e149e95b807a350e7424964399e885a7cbb8ccfab674d3",
    "nvidia-device-root": "102bf659d5419614c9d8e6aecebc80454eb26b1df6a769ac720b9a690b167b48",
}

PINNED = {
    kind: tuple(bytes.fromhex(FINGERPRINTS[name]) for name in names)
    for kind, names in {
        "nitro": ("aws-nitro-g1",),
        "sev-snp": ("amd-ark-milan", "amd-ark-genoa", "amd-ark-turin"),
        "tdx": ("intel-sgx-root",),
        "nvidia-gpu": ("nvidia-device-root",),
    }.items()
}


@cache
def root(name: str) -> bytes:
    """A pinned root certificate in DER. Raises StorageError when the installed file is not the pinned one."""
    for suffix in (".pem", ".der"):
        file = resources.files(__name__).joinpath(name + suffix)
        if file.is_file():
            certificate = x509.der(x509.load(file.read_bytes())[0])
            if hashlib.sha256(certificate).hexdigest() == FINGERPRINTS.get(name):
                return certificate
    raise StorageError(f"the pinned root {name} is missing or was changed", hint="install isolate again")
