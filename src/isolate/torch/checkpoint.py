"""Sealed checkpoints: torch.distributed.checkpoint over files that hide everything and say who wrote them.

    >>> import tempfile, warnings
    >>> import torch, torch.distributed.checkpoint as dcp
    >>> from isolate import Identity, SigningKey
    >>> from isolate.torch import SealedStorageReader, SealedStorageWriter
    >>> warnings.simplefilter("ignore")  # torch says that this is a single process
    >>> owner, identity, path = SigningKey.generate(), Identity.generate(), tempfile.mkdtemp()
    >>> writer = SealedStorageWriter(path, recipients=[identity.recipient], sign=owner, epoch=1)
    >>> _ = dcp.save({"w": torch.ones(2), "step": 7}, storage_writer=writer)
    >>> state = {"w": torch.zeros(2), "step": 0}
    >>> dcp.load(state, storage_reader=SealedStorageReader(path, identity=identity, signed_by=owner.verifying_key))
    >>> state
    {'w': tensor([1., 1.]), 'step': 7}

docs/spec/sealed-checkpoint.md; workload mode: your own training code sees plaintext, whoever keeps its files does
not. Stock checkpoints name every tensor in the clear, run what is in ``.metadata``, and load whatever is put in
their place. Here one signed manifest binds the files of all ranks, and no file is unpickled.

With ``sign=workload`` and ``identity=workload`` a checkpoint is registered with the attestation service as the next
epoch of the asset ``model_id``, and loads only while it is the one in force: an older one is refused.

``dcp.save`` and ``dcp.load`` raise torch's CheckpointException, whose ``failures`` hold the error of each rank;
``refusal`` answers ours.
"""

from __future__ import annotations

from torch.distributed.checkpoint.api import CheckpointException

from isolate.errors import IsolateError
from isolate.torch.checkpoint_reader import SealedStorageReader
from isolate.torch.checkpoint_writer import SealedStorageWriter

__all__ = ["SealedStorageReader", "SealedStorageWriter", "refusal"]


def refusal(error: CheckpointException) -> IsolateError | None:
    """The first error of isolate that a rank raised, by the number of the rank; None where there is none."""
    for _, (cause, _) in sorted(error.failures.items()):
        if isinstance(cause, IsolateError):
            return cause
    return None
