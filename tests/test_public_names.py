"""The public face is a list, and the list is this one.

Who adds a public name adds it here, in ``isolate.__all__`` and in CHANGELOG.md; who removes one breaks users.
"""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import isolate

PUBLIC = [
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

# The names that the design promises. One that is not there yet stands in NOT_YET, and leaves it when it comes.
PROMISED = {
    "Epoch", "FileSigner", "Handle", "Identity", "KeyWrapper", "Recipient", "Workload", "attach", "join",
    "channel.connect", "channel.listen",
    "sealed.SealedWriter", "sealed.load_file", "sealed.open_folder", "sealed.safe_open", "sealed.save_file",
    "torch.SealedDataset", "torch.SealedStorageReader", "torch.SealedStorageWriter",
}  # fmt: skip
NOT_YET: set[str] = set()


def exists(promised: str) -> bool:
    room, _, attribute = promised.rpartition(".")
    if not room:
        return promised in isolate.__all__
    try:
        module = importlib.import_module(f"isolate.{room}")
        # A name that needs an extra is promised all the same; tests/torch uses it where the extra is.
        return attribute in module.__all__ if room == "torch" else hasattr(module, attribute)
    except ImportError:
        return False


def test_the_list_is_the_pinned_one() -> None:
    assert sorted(isolate.__all__) == sorted(PUBLIC)
    assert len(set(isolate.__all__)) == len(isolate.__all__)
    assert dir(isolate) == sorted(isolate.__all__)


@pytest.mark.parametrize("name", sorted(PROMISED))
def test_a_promised_name_is_there_unless_listed_as_missing(name: str) -> None:
    assert exists(name) is (name not in NOT_YET)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_loads(name: str) -> None:
    value = getattr(isolate, name)
    assert value.__doc__, f"{name} says nothing about itself"


def test_another_name_does_not_load() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        _ = isolate.nothing


def test_importing_isolate_loads_no_room() -> None:
    """Names come when first used (PEP 562): an enclave that seals a tensor loads no client."""
    code = "import isolate, sys; print(*(m for m in sys.modules if m.startswith('isolate.')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == []
