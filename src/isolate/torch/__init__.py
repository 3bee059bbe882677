"""Floor 6: torch.distributed between attested ranks, sealed checkpoints, sealed datasets (extra ``torch``).

*Workload* mode: the measured code sees plaintext; the operator of machines, network and disks does not.

    import isolate.torch
    dist.init_process_group("isolate")        # in an enclave: isolate launch ... train.py

Importing this registers the backend "isolate" with torch.distributed. Without torch it can still be imported, for
what needs none; a name that needs it then raises MissingExtra.

    >>> import torch.distributed as dist
    >>> import isolate.torch
    >>> "isolate" in dist.Backend.backend_list
    True
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from isolate.errors import MissingExtra

if TYPE_CHECKING:
    from isolate.torch.checkpoint_reader import SealedStorageReader
    from isolate.torch.checkpoint_writer import SealedStorageWriter
    from isolate.torch.dataset import SealedDataset, SealedIterableDataset
    from isolate.torch.handoff import SealedDataLoader
    from isolate.torch.links import Peers
    from isolate.torch.process_group import IsolateProcessGroup

_PUBLIC = {
    "IsolateProcessGroup": "process_group",
    "Peers": "links",
    "SealedDataLoader": "handoff",
    "SealedDataset": "dataset",
    "SealedIterableDataset": "dataset",
    "SealedStorageReader": "checkpoint_reader",
    "SealedStorageWriter": "checkpoint_writer",
}

__all__ = [
    "IsolateProcessGroup",
    "Peers",
    "SealedDataLoader",
    "SealedDataset",
    "SealedIterableDataset",
    "SealedStorageReader",
    "SealedStorageWriter",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'isolate.torch' has no attribute {name!r}")
    if find_spec("torch") is None:
        raise MissingExtra("torch is not installed", hint="pip install 'isolate-confidential[torch]'")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)


if find_spec("torch") is not None:
    from isolate.torch.backend import register

    register()
