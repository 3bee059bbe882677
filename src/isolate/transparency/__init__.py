"""Floor 2: what an auditor of the transparency log needs: checkpoints, proofs, tiles, and nothing else.

    >>> from isolate.crypto import merkle
    >>> from isolate.crypto.signing import SigningKey
    >>> from isolate.transparency import Checkpoint, InclusionProof, sign_checkpoint
    >>> key, store = SigningKey.generate(), merkle.MemoryStore()
    >>> root = merkle.append(store, 0, b"released")
    >>> note = sign_checkpoint(key, "example.com/log", 1, root)
    >>> seen = Checkpoint.verify(note, "example.com/log", key.verifying_key.ed25519)
    >>> InclusionProof.build(store, 0, 1).verify(b"released", seen)

The format is docs/spec/log.md, which is C2SP tlog-checkpoint, tlog-cosignature and tlog-tiles.
"""

from isolate.transparency.checkpoint import Checkpoint, Witness, cosign, sign_checkpoint, verifier_key
from isolate.transparency.proof import ConsistencyProof, InclusionProof, LogMemory, check_store
from isolate.transparency.tiles import Tile, TileStore, tile_bytes

__all__ = [
    "Checkpoint",
    "ConsistencyProof",
    "InclusionProof",
    "LogMemory",
    "Tile",
    "TileStore",
    "Witness",
    "check_store",
    "cosign",
    "sign_checkpoint",
    "tile_bytes",
    "verifier_key",
]
