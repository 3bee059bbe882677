"""Derived assets inside an enclave: sealing what an operation made, and opening it again for who may use it.

Spec: docs/spec/operations.md, section 6. A reference is a map of the new asset's name, the digest of its file and
the id of the handle that it was made through:

    >>> from isolate.enclave.values import Derived
    >>> sorted(Derived().longest())
    ['asset', 'digest', 'handle']

A reference is no secret and no right. The right is a handle whose chain has that handle in it: the one itself, or
one that was narrowed from it. Every use is charged to that chain, and a revocation anywhere in it ends the asset.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from isolate import sealed
from isolate.capability.token import ID_SIZE, VerifiedToken
from isolate.enclave.view import View
from isolate.errors import ScopeExceeded, UsageError
from isolate.messages.derive import derived_name, is_derived_of
from isolate.messages.owner import MAX_ASSET

if TYPE_CHECKING:
    import numpy as np

    from isolate.capability.invocation import VerifiedInvocation
    from isolate.enclave.workload import Workload

KEPT = 4  # opened at once: each may be as large as the asset it was made of
_MADE_OF, _MADE_THROUGH = "isolate.made-of", "isolate.made-through"  # metadata of the sealed file


class Derivations:
    """What was derived of one asset. Safe to share between threads.

    ``makes``: whether any is made here. A reference to it leaves in a reply of a size for names of 128 bytes.
    """

    def __init__(self, workload: Workload, asset: str, *, makes: bool = False) -> None:
        if makes and len(derived_name(asset, bytes(ID_SIZE)).encode()) > MAX_ASSET:
            raise UsageError("the name of this asset is too long for others to be derived of it")
        self._workload = workload
        self._asset = asset
        self._open: OrderedDict[bytes, tuple[dict[str, Any], View]] = OrderedDict()
        self._lock = threading.Lock()

    def seal(
        self, invocation: VerifiedInvocation, tensors: Mapping[str, np.ndarray[Any, Any]]
    ) -> dict[str, str | bytes]:
        """Seal and register what this invocation made, before it is settled; the reference to it."""
        name, handle = derived_name(self._asset, invocation.id), invocation.token.id
        metadata = {_MADE_OF: self._asset, _MADE_THROUGH: handle.hex()}
        registered = self._workload.derive(name, tensors, invocation=invocation.id, metadata=metadata)
        return {"asset": name, "digest": registered.digest, "handle": handle}

    def check(self, reference: dict[str, Any], token: VerifiedToken) -> None:
        """What can be said without opening it. Raises ScopeExceeded.

        1. The chain has the handle that the asset was made through.
        2. The name is one of this asset's derivations.
        """
        if reference["handle"] not in token.handles:  # 1
            raise ScopeExceeded("this handle does not descend from the one that the asset was made through")
        if not is_derived_of(reference["asset"], self._asset):  # 2
            raise ScopeExceeded("this was not made of the token's asset")

    def view(self, reference: dict[str, Any], token: VerifiedToken) -> View:
        """The tensors, for the holder of this token: after ``check``, once more,

        3. The file has the digest of the reference, and the service releases its keys.
        4. It is of that name, and the enclave that sealed it wrote the same asset and handle into it.

        Raises ScopeExceeded for 4, and what the service or the file raises.
        """
        self.check(reference, token)
        with self._lock:
            found = self._open.get(reference["digest"])
            if found is None or found[0] != reference:
                found = reference, self._load(reference)
                self._open[reference["digest"]] = found
            self._open.move_to_end(reference["digest"])
            while len(self._open) > KEPT:
                self._open.popitem(last=False)
        return found[1]

    def _load(self, reference: dict[str, Any]) -> View:
        path = self._workload.locate(reference["asset"])
        with sealed.safe_open(path, identity=self._workload, expect=reference["digest"]) as file:  # 3
            said = file.metadata() or {}
            made = file.facts.model_id, said.get(_MADE_OF), said.get(_MADE_THROUGH)
            if made != (reference["asset"], self._asset, reference["handle"].hex()):  # 4
                raise ScopeExceeded("this is another asset, or was made of another, or through another handle")
            return View(file.get_tensors())
