"""Seal two tensors, open them again, and see what is refused. No enclave and no service: files and keys only.

Run it: python examples/seal_and_open.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from isolate import Epoch, Identity, SigningKey, sealed
from isolate.errors import IsolateError


def main(folder: Path) -> None:
    owner = SigningKey.generate()  # who seals
    service, recovery = Identity.generate(), Identity.generate()  # who can open; recovery is kept offline
    path = folder / "model.sealed"
    weights = {"layer.weight": np.arange(12, dtype=np.float32).reshape(3, 4), "layer.bias": np.ones(3, np.float32)}

    digest = sealed.save_file(
        weights, path, recipients=[service.recipient, recovery.recipient], sign=owner, model_id="example", epoch=1
    )
    print(f"sealed {path.name}, digest {digest.hex()[:16]}…")

    # The signer is named, so that nobody else's file is taken for it.
    opened = sealed.load_file(path, identity=service, signed_by=owner.verifying_key)
    assert all(np.array_equal(opened[name], weights[name]) for name in weights)

    # Lazily: header and footer now, the rest when it is asked for.
    with sealed.safe_open(path, identity=recovery, expect=digest) as file:
        print(file.keys(), file.get_slice("layer.weight")[1:, 2].tolist())

    # Anyone can seal to a public recipient. Without signed_by= that would go unnoticed.
    forged = folder / "forged.sealed"
    sealed.save_file(
        {"layer.bias": np.zeros(3)}, forged, recipients=[service.recipient], sign=SigningKey.generate()
    )
    flipped = folder / "flipped.sealed"
    data = bytearray(path.read_bytes())
    data[70_000] ^= 1
    flipped.write_bytes(data)
    for what, attempt in {
        "a stranger's file": lambda: sealed.load_file(forged, identity=service, signed_by=owner.verifying_key),
        "no word on who sealed it": lambda: sealed.load_file(path, identity=service),
        "one bit flipped": lambda: sealed.load_file(flipped, identity=service, signed_by=owner.verifying_key),
        "somebody else's key": lambda: sealed.load_file(path, identity=Identity.generate(), expect=digest),
        "an epoch that is too old": lambda: sealed.load_file(
            path, identity=service, signed_by=owner.verifying_key, expect=Epoch(2)
        ),
    }.items():
        try:
            attempt()
        except IsolateError as refusal:
            print(f"refused, {what}: {refusal.code}")
        else:
            raise SystemExit(f"{what} was not refused")

    # Another recipient, in place: neither the data nor the digest changes.
    successor = Identity.generate()
    sealed.rewrap(path, identity=recovery, recipients=[successor.recipient, recovery.recipient])
    assert len(sealed.load_file(path, identity=successor, expect=digest)) == 2
    print("rewrapped: the digest is the same")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(Path(name))
