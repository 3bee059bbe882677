"""AEAD into given buffers: known answers, whole buffers, refusals that leave no plaintext."""

from __future__ import annotations

import json
import mmap
from pathlib import Path

import numpy as np
import pytest

from isolate.crypto import aead
from isolate.crypto.aead import MAX_PLAINTEXT, Cipher, Suite, as_bytes
from isolate.crypto.secret import Secret
from isolate.errors import UsageError

KEY = bytes(range(32))


@pytest.fixture(params=["cffi", "public"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to AEGIS-256: libsodium into our buffers, and PyNaCl's public functions."""
    if request.param == "public":
        monkeypatch.setattr(aead, "SODIUM", None)
    else:
        assert aead.SODIUM is not None, "this PyNaCl does not give AEGIS-256 as aead.py expects it"
    return str(request.param)


@pytest.fixture(params=[*Suite, "AEGIS_256 by public functions"], ids=str)
def cipher(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Cipher:
    if not isinstance(request.param, Suite):
        monkeypatch.setattr(aead, "SODIUM", None)
        return Cipher(Suite.AEGIS_256, Secret(KEY))
    return Cipher(request.param, Secret(KEY))


def test_aegis_256_vectors(path: str, vectors: Path) -> None:
    cases = json.loads((vectors / "aegis" / "aegis-256-test-vectors.json").read_text())
    assert [case["name"] for case in cases] == ["Update Test Vector", *(f"Test Vector {n}" for n in range(1, 10))]
    opened = refused = 0
    for case in cases[1:]:
        key, nonce, data, text, tag = (bytes.fromhex(case[name]) for name in ("key", "nonce", "ad", "ct", "tag256"))
        cipher = Cipher(Suite.AEGIS_256, Secret(key))
        if "error" in case:
            assert cipher.open(text + tag, nonce, data) is None, case["name"]
            refused += 1
        else:
            message = bytes.fromhex(case["msg"])
            assert cipher.seal(message, nonce, data) == text + tag, case["name"]
            assert cipher.open(text + tag, nonce, data) == message, case["name"]
            opened += 1
    assert (opened, refused) == (5, 4)


@pytest.mark.parametrize("fault", ["encrypts nothing", "opens anything", "is not there"])
def test_a_wrong_known_answer_leaves_the_public_functions(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    from nacl import _sodium

    class Library:
        if fault != "is not there":
            crypto_aead_aegis256_decrypt = staticmethod(_sodium.lib.crypto_aead_aegis256_decrypt)
        crypto_aead_aegis256_encrypt = staticmethod(_sodium.lib.crypto_aead_aegis256_encrypt)

    if fault == "encrypts nothing":
        monkeypatch.setattr(Library, "crypto_aead_aegis256_encrypt", lambda *_: 0)
    if fault == "opens anything":
        decrypt = Library.crypto_aead_aegis256_decrypt
        monkeypatch.setattr(Library, "crypto_aead_aegis256_decrypt", lambda *given: decrypt(*given) and 0)
    monkeypatch.setattr(_sodium, "lib", Library)
    assert aead._load_sodium() is None


@pytest.mark.threat("KEY-7")
def test_every_flipped_byte_is_refused_and_the_destination_wiped(cipher: Cipher) -> None:
    nonce, data = bytes(cipher.nonce_size), b"header"
    sealed = cipher.seal(b"forty bytes of weights, more or less ...", nonce, data)
    places = [("sealed", n) for n in range(len(sealed))]
    places += [("nonce", n) for n in range(len(nonce))] + [("data", n) for n in range(len(data))]
    for part, index in places:
        parts = {"sealed": bytearray(sealed), "nonce": bytearray(nonce), "data": bytearray(data)}
        parts[part][index] ^= 1
        out = bytearray(b"\xaa" * 40)
        assert not cipher.open_into(out, parts["sealed"], parts["nonce"], bytes(parts["data"])), (part, index)
        assert out == bytes(40), (part, index)


@pytest.mark.threat("KEY-6")
@pytest.mark.parametrize("shape", [(7,), (3, 5), (0,), (0, 3), ()])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "c8", "i1", ">f4", "?"])
def test_an_array_is_sealed_whole(cipher: Cipher, shape: tuple[int, ...], dtype: str) -> None:
    """A length counted in elements would leave three quarters of a float32 array in plaintext."""
    array = np.ones(shape, dtype)
    sealed = bytearray(array.nbytes + cipher.tag_size)
    nonce = bytes(cipher.nonce_size)
    cipher.seal_into(sealed, array, nonce)
    assert sealed == cipher.seal(array.tobytes(), nonce)
    assert not array.nbytes or array.tobytes() not in bytes(sealed)
    back = np.zeros(shape, dtype)
    assert cipher.open_into(back, sealed, nonce)
    assert back.tobytes() == array.tobytes()


def test_in_place(cipher: Cipher) -> None:
    buffer = bytearray(b"in place" + bytes(cipher.tag_size))
    nonce = bytes(cipher.nonce_size)
    cipher.seal_into(buffer, memoryview(buffer)[:8], nonce)
    assert bytes(buffer) == cipher.seal(b"in place", nonce)
    assert cipher.open_into(memoryview(buffer)[:8], buffer, nonce)
    assert buffer[:8] == b"in place"


def test_in_place_leaves_nothing_when_it_refuses(cipher: Cipher) -> None:
    nonce = bytes(cipher.nonce_size)
    buffer = bytearray(cipher.seal(b"in place", nonce))
    buffer[-1] ^= 1
    assert not cipher.open_into(memoryview(buffer)[:8], buffer, nonce)
    assert buffer[:8] == bytes(8)


def test_buffers_that_cannot_be_used_are_refused(cipher: Cipher) -> None:
    nonce = bytes(cipher.nonce_size)
    tag = cipher.tag_size
    strided = np.zeros(16, "u1")[::2]
    with pytest.raises(UsageError, match="contiguous"):
        cipher.seal_into(bytearray(8 + tag), strided, nonce)
    with pytest.raises(UsageError, match="contiguous"):
        cipher.open_into(strided, bytes(8 + tag), nonce)
    with pytest.raises(UsageError, match="contiguous"):
        cipher.seal(b"", np.zeros(2 * cipher.nonce_size, "u1")[::2])
    with pytest.raises(UsageError, match="read-only"):
        cipher.seal_into(bytes(8 + tag), bytes(8), nonce)
    with pytest.raises(UsageError, match="read-only"):
        cipher.open_into(bytes(8), bytes(8 + tag), nonce)
    with pytest.raises(UsageError, match="no buffer"):
        cipher.seal("text", nonce)  # type: ignore[arg-type]
    for size in (7, 9):
        with pytest.raises(UsageError, match="longer"):
            cipher.seal_into(bytearray(size + tag), bytes(8), nonce)
        with pytest.raises(UsageError, match="longer"):
            cipher.open_into(bytearray(size), bytes(8 + tag), nonce)
    for short in (b"", nonce[:-1], nonce + b"\0"):
        with pytest.raises(UsageError, match="nonce"):
            cipher.seal(b"x", short)
    assert cipher.open(bytes(tag - 1), nonce) is None


def test_a_buffer_too_large_for_the_library_is_refused_before_it_is_read(cipher: Cipher) -> None:
    with mmap.mmap(-1, MAX_PLAINTEXT + 1 + cipher.tag_size) as pages, memoryview(pages) as view:
        plain = view[: MAX_PLAINTEXT + 1]
        with pytest.raises(UsageError, match="at most"):
            cipher.seal_into(view, plain, bytes(cipher.nonce_size))
        with pytest.raises(UsageError, match="at most"):
            cipher.open_into(plain, view, bytes(cipher.nonce_size))
        plain.release()


def test_suites_do_not_open_one_another() -> None:
    for one in Suite:
        for other in set(Suite) - {one}:
            sealed = Cipher(one, Secret(KEY)).seal(bytes(64), bytes(one.nonce_size))
            assert Cipher(other, Secret(KEY)).open(sealed, bytes(other.nonce_size)) is None


def test_a_wiped_cipher_does_nothing_more(cipher: Cipher) -> None:
    cipher.wipe()
    with pytest.raises(UsageError, match="wiped"):
        cipher.seal(b"x", bytes(cipher.nonce_size))
    with pytest.raises(UsageError, match="wiped"):
        cipher.open(bytes(64), bytes(cipher.nonce_size))


def test_the_cipher_keeps_its_own_key(cipher: Cipher) -> None:
    """A caller who wipes the key that went in does not turn a live cipher's key into zeros."""
    key = Secret(KEY)
    other = Cipher(cipher.suite, key)
    key.wipe()
    nonce = bytes(cipher.nonce_size)
    assert other.seal(b"x", nonce) == cipher.seal(b"x", nonce)


def test_the_key_does_not_show(cipher: Cipher) -> None:
    for text in (repr(cipher), str(cipher), f"{cipher}"):
        assert KEY.hex() not in text
        assert "hidden" in text


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_a_key_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(UsageError, match="32 bytes"):
        Cipher(Suite.AES_256_GCM, Secret(bytes(size)))


def test_a_flat_view_of_bytes_is_not_copied() -> None:
    buffer = bytearray(4)
    as_bytes(buffer, writable=True)[0] = 7
    assert buffer[0] == 7


@pytest.mark.parametrize(
    ("cpu", "suite", "fastest"),
    [
        ("fpu aes avx2", Suite.AEGIS_256, Suite.AEGIS_256),
        ("fpu aes avx2 vaes vpclmulqdq", Suite.AEGIS_256, Suite.AEGIS_256),
        ("fpu aes avx2 vaes vpclmulqdq avx512f", Suite.AEGIS_256, Suite.AES_256_GCM),
        ("fpu", Suite.CHACHA20_POLY1305, Suite.CHACHA20_POLY1305),
    ],
)
def test_preferred_and_fastest_suite_follow_the_cpu(
    monkeypatch: pytest.MonkeyPatch, cpu: str, suite: Suite, fastest: Suite
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: f"flags : {cpu}")
    aead.preferred_suite.cache_clear()
    assert aead.preferred_suite.__wrapped__() is suite
    assert aead.fastest_suite.__wrapped__() is fastest
    aead.preferred_suite.cache_clear()
