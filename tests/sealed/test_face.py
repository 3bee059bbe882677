"""The face of safetensors: the same names and answers, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from isolate import Identity, SigningKey, sealed
from isolate.crypto.aead import Suite
from isolate.errors import UsageError
from isolate.sealed.stores import MemorySource

Model = dict[str, np.ndarray[Any, Any]]


@pytest.mark.parametrize("suite", list(Suite))
def test_what_is_sealed_opens_to_the_same(
    tmp_path: Path, model: Model, owner: SigningKey, identity: Identity, suite: Suite
) -> None:
    path = tmp_path / "m.sealed"
    digest = sealed.save_file(
        model, path, recipients=[identity.recipient], sign=owner, metadata={"format": "np"}, suite=suite
    )
    assert sealed.public_facts(path).digest == digest
    for pin in ({"signed_by": owner.verifying_key}, {"signed_by": str(owner.verifying_key)}, {"expect": digest}):
        found = sealed.load_file(path, identity=identity, **pin)
        assert list(found) == list(model)
        for name, tensor in model.items():
            assert found[name].dtype == tensor.dtype
            np.testing.assert_array_equal(found[name], tensor)


def test_it_answers_what_safetensors_answers(
    tmp_path: Path, model: Model, owner: SigningKey, identity: Identity
) -> None:
    plain, path = tmp_path / "m.safetensors", tmp_path / "m.sealed"
    safetensors.numpy.save_file(model, plain, metadata={"format": "np"})
    sealed.seal_file(plain, path, recipients=[identity.recipient], sign=owner)
    with (
        safetensors.safe_open(plain, framework="np") as theirs,
        sealed.safe_open(path, framework="np", identity=identity, signed_by=owner.verifying_key) as ours,
    ):
        assert sorted(ours.keys()) == sorted(theirs.keys())
        assert ours.offset_keys() == theirs.offset_keys()
        assert ours.metadata() == theirs.metadata()
        for name in theirs.keys():  # noqa: SIM118 (safe_open is no mapping)
            np.testing.assert_array_equal(ours.get_tensor(name), theirs.get_tensor(name))
            assert ours.get_slice(name).get_shape() == theirs.get_slice(name).get_shape()
            assert ours.get_slice(name).get_dtype() == theirs.get_slice(name).get_dtype()
        some = ["step", "encoder.bias"]
        assert list(ours.get_tensors(some)) == some


SLICES = [
    np.s_[:], np.s_[0], np.s_[-1], np.s_[2:5], np.s_[:, 3], np.s_[:, 1:9:2], np.s_[::-1], np.s_[..., 0],
    np.s_[1:3, ..., 5:7], np.s_[3, 4, 5], np.s_[5:2], np.s_[None, 2], np.s_[::3, ::-2, ::5], np.s_[-3:, -2:, -1:],
]  # fmt: skip


@pytest.mark.parametrize("index", SLICES, ids=str)
def test_a_slice_is_numpys(
    model: Model, seal: Callable[..., bytes], owner: SigningKey, identity: Identity, index: Any
) -> None:
    data = MemorySource(seal(model))
    with sealed.safe_open(data, identity=identity, signed_by=owner.verifying_key) as file:
        found = file.get_slice("decoder.weight")[index]
        np.testing.assert_array_equal(found, model["decoder.weight"][index])
        assert found.shape == model["decoder.weight"][index].shape


@pytest.mark.parametrize("index", [np.s_[9], np.s_[0, 0, 0, 0], np.s_[[1, 2]], np.s_[True], "a", 1.5])
def test_an_index_that_is_none_is_refused(
    model: Model, seal: Callable[..., bytes], owner: SigningKey, identity: Identity, index: Any
) -> None:
    with (
        sealed.safe_open(MemorySource(seal(model)), identity=identity, signed_by=owner.verifying_key) as file,
        pytest.raises(UsageError),
    ):
        file.get_slice("decoder.weight")[index]
