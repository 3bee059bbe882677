"""Key agreement of the channel, and names in certificates: hostile input, and keys that do not show."""

from __future__ import annotations

import copy
import pickle

import pytest

from isolate.crypto import x509
from isolate.crypto.exchange import LATTICE_BOXED, LATTICE_PUBLIC, CurveKey, LatticeKey, encapsulate
from isolate.crypto.secret import Secret
from isolate.errors import MalformedError, UsageError

CURVE = bytes(range(32))
LATTICE = bytes(range(64))


@pytest.mark.parametrize("size", [0, 31, 33, 1184])
def test_curve_keys_of_another_size(size: int) -> None:
    with pytest.raises(MalformedError):
        CurveKey(Secret(CURVE)).exchange(bytes([9]) * size)


@pytest.mark.parametrize("size", [0, 32, LATTICE_PUBLIC - 1, LATTICE_PUBLIC + 1])
def test_lattice_keys_of_another_size(size: int) -> None:
    with pytest.raises(MalformedError):
        encapsulate(bytes(size))


def test_lattice_keys_out_of_range_are_refused() -> None:
    """FIPS 203, 7.2: each coefficient of an encapsulation key is below the modulus."""
    with pytest.raises(MalformedError):
        encapsulate(b"\xff" * LATTICE_PUBLIC)


@pytest.mark.parametrize("size", [0, LATTICE_BOXED - 1, LATTICE_BOXED + 1])
def test_ciphertexts_of_another_size(size: int) -> None:
    with pytest.raises(MalformedError):
        LatticeKey(Secret(LATTICE)).decapsulate(bytes(size))


def test_a_changed_ciphertext_gives_another_secret() -> None:
    """Implicit rejection: no error tells an attacker anything, and the secrets differ."""
    key = LatticeKey(Secret(LATTICE))
    shared, boxed = encapsulate(key.public)
    assert key.decapsulate(boxed).equals(shared)
    for index in (0, 500, LATTICE_BOXED - 1):
        changed = bytearray(boxed)
        changed[index] ^= 1
        assert not key.decapsulate(bytes(changed)).equals(shared)


@pytest.mark.parametrize("key", [CurveKey(Secret(CURVE)), LatticeKey(Secret(LATTICE))], ids=repr)
def test_private_keys_do_not_show(key: CurveKey | LatticeKey) -> None:
    for text in (repr(key), str(key), f"{key}"):
        assert "hidden" in text
        assert CURVE.hex() not in text
    for leak in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(UsageError):
            leak(key)
    with pytest.raises(TypeError):
        vars(key)


def test_a_name_in_a_certificate_cannot_steer_a_terminal() -> None:
    key = x509.P384Key.generate()
    certificate = key.self_signed("\x1b[2Jroot\u202e", not_before=0, not_after=1000)
    assert x509.subject(x509.load(certificate)[0]) == "?[2Jroot?"
