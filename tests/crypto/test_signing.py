"""Signatures and the text of keys: purposes, both halves, weak keys, slips of the pen."""

from __future__ import annotations

import contextlib
import copy
import errno
import os
import pickle
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from isolate.crypto import signing
from isolate.crypto.kem import Identity, Recipient
from isolate.crypto.secret import Secret
from isolate.crypto.signing import (
    HYBRID_SIGNATURE,
    Purpose,
    SigningKey,
    VerifyingKey,
    from_text,
    read_key_file,
    to_text,
    write_key_file,
)
from isolate.errors import KeyFormatError, StorageError, UsageError

SEED = bytes(range(32))
KEY = SigningKey(Secret(SEED))
OTHER = SigningKey(Secret(bytes(32)))
PUBLIC = KEY.verifying_key


def test_purposes_are_unique_and_of_one_form() -> None:
    assert len({purpose.value for purpose in Purpose}) == len(Purpose.__members__)
    for purpose in Purpose:
        assert set(purpose.value) <= set(string.ascii_lowercase + "-/")


@pytest.mark.threat("KEY-2")
def test_a_signature_is_good_for_its_purpose_only() -> None:
    for made in Purpose:
        signature = KEY.sign(made, b"message")
        assert [asked for asked in Purpose if PUBLIC.verify(asked, b"message", signature)] == [made]


def test_a_hybrid_signature_is_good_for_its_purpose_only() -> None:
    signature = KEY.sign_hybrid(Purpose.SEALED_DIRECTORY, b"message")
    assert [p for p in Purpose if PUBLIC.verify_hybrid(p, b"message", signature)] == [Purpose.SEALED_DIRECTORY]


def test_the_frame_is_the_one_of_the_specification() -> None:
    """Another implementation, given the frame of docs/spec/crypto.md, verifies: the frame is what it says."""
    signature = KEY.sign(Purpose.GRANT, b"message")
    Ed25519PublicKey.from_public_bytes(PUBLIC.ed25519).verify(signature, b"isolate/v1/capability/grant\0message")


NOTE = b"eyJub3RlIjoxfQ.example.com/log\n1\n"
TOKEN = b"eyJhbGciOiJFZERTQSJ9.eyJ4IjoxfQ"


def test_notes_tokens_and_purposes_do_not_pass_for_one_another() -> None:
    """The two bare forms, which other people's formats prescribe, share keys with the framed form."""
    note, token = KEY.sign_note(NOTE), KEY.sign_token(TOKEN)
    assert signing.verify_note(PUBLIC.ed25519, NOTE, note)
    assert signing.verify_token(PUBLIC.ed25519, TOKEN, token)
    assert not signing.verify_token(PUBLIC.ed25519, NOTE, note)
    for purpose in Purpose:
        framed = b"isolate/v1/" + purpose.value.encode() + b"\0m\n"
        signature = KEY.sign(purpose, b"m\n")
        assert not signing.verify_note(PUBLIC.ed25519, framed, signature)
        assert not signing.verify_token(PUBLIC.ed25519, framed, signature)
        for message, bare in ((NOTE, note), (TOKEN, token)):
            assert not PUBLIC.verify(purpose, message, bare)
    for refused in (b"no newline", b"zero\0\n", b""):
        with pytest.raises(UsageError):
            KEY.sign_note(refused)
    for refused in (NOTE, TOKEN + b"\n", b"isolate/v1/x\0", b""):
        with pytest.raises(UsageError):
            KEY.sign_token(refused)


@pytest.mark.threat("KEY-2")
def test_a_signature_brings_no_beginning_of_another_message_along() -> None:
    """The library reads signature and message as one: what follows a signature of 64 bytes is the message."""
    frame, other = b"isolate/v1/capability/invocation\0", b"isolate/v1/capability/grant\0"
    signed = KEY.sign(Purpose.INVOCATION, b"arguments" + other + b"m\n")
    assert not PUBLIC.verify(Purpose.GRANT, b"m\n", signed + frame + b"arguments")
    assert not signing.verify_note(PUBLIC.ed25519, b"m\n", signed + frame + b"arguments" + other)
    signed = KEY.sign(Purpose.INVOCATION, TOKEN)
    assert not signing.verify_token(PUBLIC.ed25519, TOKEN, signed + frame)
    hybrid = KEY.sign_hybrid(Purpose.SEALED_DIRECTORY, b"m")
    assert not PUBLIC.verify_hybrid(Purpose.SEALED_DIRECTORY, b"m", hybrid + b"m")


@pytest.mark.parametrize("size", [0, 31, 33])
def test_bare_forms_with_keys_or_signatures_of_another_size(size: int) -> None:
    assert not signing.verify_note(bytes(size), NOTE, bytes(64))
    assert not signing.verify_token(bytes(size), TOKEN, bytes(64))
    assert not signing.verify_note(PUBLIC.ed25519, NOTE, bytes(size))
    assert not signing.verify_token(PUBLIC.ed25519, TOKEN, bytes(size))
    assert not signing.is_public_key(bytes(size))


@pytest.mark.parametrize("size", [0, 1, 111, 112, 240, 100_000])
def test_libsodium_and_openssl_make_one_signature(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert signing.SODIUM is not None
    made = KEY.sign(Purpose.INVOCATION, bytes(size))
    monkeypatch.setattr(signing, "SODIUM", None)
    other = SigningKey(Secret(SEED))
    assert other.sign(Purpose.INVOCATION, bytes(size)) == made
    assert PUBLIC.verify(Purpose.INVOCATION, bytes(size), made)


def test_what_libsodium_signs_with_is_wiped_with_its_key() -> None:
    assert signing.SODIUM is not None
    key = SigningKey(Secret(SEED))
    assert key._ed25519 is None  # no second copy, in OpenSSL's memory
    memory = signing.SODIUM[0].buffer(key._sodium)
    assert memory[32:] == key.verifying_key.ed25519 and any(memory[:32])
    del key
    assert not any(memory[:])


def test_a_key_that_fails_half_way_is_wiped_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    assert signing.SODIUM is not None
    made: list[Any] = []
    whole = signing._sodium_key

    def remembered(seed: Secret, public: bytes) -> Any:
        made.append(whole(seed, public))
        assert any(signing.SODIUM[0].buffer(made[0])[:32])  # type: ignore[index]
        return made[0]

    def fails(*_: object) -> VerifyingKey:
        raise KeyFormatError("no")

    monkeypatch.setattr(signing, "_sodium_key", remembered)
    monkeypatch.setattr(signing, "VerifyingKey", fails)
    with contextlib.suppress(KeyFormatError):
        SigningKey(Secret(SEED))
    assert not any(signing.SODIUM[0].buffer(made[0])[:])
    # One that never had such a memory ends quietly: a complaint from __del__ would fail this test.
    wiped = Secret(SEED)
    wiped.wipe()
    with pytest.raises(UsageError, match="wiped"):
        SigningKey(wiped)


def test_signing_keys_are_derived_from_the_seed() -> None:
    assert SigningKey(Secret(SEED)).verifying_key == PUBLIC
    assert OTHER.verifying_key != PUBLIC
    assert len(PUBLIC.to_bytes()) == 64


@pytest.mark.parametrize(
    "change",
    [lambda s: s[:-1], lambda s: s + b"\0", lambda s: b"", lambda s: bytes(64), lambda s: b"\xff" * 64],
    ids=["short", "long", "empty", "zeros", "ones"],
)
def test_signatures_of_another_shape(change: Callable[[bytes], bytes]) -> None:
    assert not PUBLIC.verify(Purpose.GRANT, b"m", change(KEY.sign(Purpose.GRANT, b"m")))
    assert not PUBLIC.verify_hybrid(Purpose.GRANT, b"m", change(KEY.sign_hybrid(Purpose.GRANT, b"m")))


def test_every_flipped_bit_of_an_ed25519_signature() -> None:
    signature = KEY.sign(Purpose.GRANT, b"m")
    for bit in range(len(signature) * 8):
        changed = bytearray(signature)
        changed[bit // 8] ^= 1 << bit % 8
        assert not PUBLIC.verify(Purpose.GRANT, b"m", bytes(changed)), bit


@pytest.mark.threat("KEY-3")
def test_each_half_of_a_hybrid_signature_counts() -> None:
    signature = KEY.sign_hybrid(Purpose.SEALED_DIRECTORY, b"m")
    assert len(signature) == HYBRID_SIGNATURE
    assert PUBLIC.verify_hybrid(Purpose.SEALED_DIRECTORY, b"m", signature)
    stranger = OTHER.sign_hybrid(Purpose.SEALED_DIRECTORY, b"m")
    for start, end in ((0, 64), (64, 64 + 1952), (64 + 1952, HYBRID_SIGNATURE)):
        foreign = signature[:start] + stranger[start:end] + signature[end:]
        assert not PUBLIC.verify_hybrid(Purpose.SEALED_DIRECTORY, b"m", foreign), (start, end)
        for index in (start, (start + end) // 2, end - 1):
            changed = bytearray(signature)
            changed[index] ^= 1
            assert not PUBLIC.verify_hybrid(Purpose.SEALED_DIRECTORY, b"m", bytes(changed)), index


def test_a_stranger_who_knows_one_half_signs_for_nobody() -> None:
    """Neither half of the verifying key alone is enough: with the other swapped, the signature is refused."""
    signature = KEY.sign_hybrid(Purpose.SEALED_DIRECTORY, b"m")
    mixed = (
        VerifyingKey(PUBLIC.ed25519, OTHER.verifying_key.mldsa65_digest),
        VerifyingKey(OTHER.verifying_key.ed25519, PUBLIC.mldsa65_digest),
    )
    assert not any(key.verify_hybrid(Purpose.SEALED_DIRECTORY, b"m", signature) for key in mixed)


def test_a_hybrid_signature_over_another_message_or_purpose() -> None:
    good = KEY.sign_hybrid(Purpose.SEALED_DIRECTORY, b"m")
    other = KEY.sign_hybrid(Purpose.SEALED_DIRECTORY, b"n")
    assert not PUBLIC.verify_hybrid(Purpose.SEALED_DIRECTORY, b"n", good)
    # The halves of two good signatures do not combine.
    assert not PUBLIC.verify_hybrid(Purpose.SEALED_DIRECTORY, b"m", good[:64] + other[64:])
    assert not PUBLIC.verify_hybrid(Purpose.SEALED_DIRECTORY, b"m", other[:64] + good[64:])


# The eight points of small order and their encodings that are not canonical: with one of them as public key, a
# signature that anyone can write verifies for any message, where the library does not refuse the key.
SMALL_ORDER = [
    "0100000000000000000000000000000000000000000000000000000000000000",
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0000000000000000000000000000000000000000000000000000000000000080",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa",
    "0100000000000000000000000000000000000000000000000000000000000080",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
]


@pytest.mark.threat("KEY-1")
@pytest.mark.parametrize("point", SMALL_ORDER)
def test_keys_of_small_order_verify_nothing(point: str) -> None:
    public = bytes.fromhex(point)
    assert not signing.is_public_key(public)
    identity = bytes([1]) + bytes(31)
    for r in (identity, public):
        for message in (b"", b"0", b"1", b"2", b"3", b"4", b"5", b"6", b"7"):
            assert not signing.verify(public, Purpose.GRANT, message, r + bytes(32))


def test_the_attack_on_small_order_keys_is_real() -> None:
    """OpenSSL takes the forged signature: the reason why libsodium verifies (docs/adr/0001)."""
    identity = bytes([1]) + bytes(31)
    Ed25519PublicKey.from_public_bytes(identity).verify(identity + bytes(32), b"any message")
    assert not signing.verify(identity, Purpose.GRANT, b"any message", identity + bytes(32))


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_public_keys_of_another_size_verify_nothing(size: int) -> None:
    assert not signing.verify(bytes(size), Purpose.GRANT, b"m", bytes(64))
    with pytest.raises(KeyFormatError):
        VerifyingKey(bytes(size), bytes(32))
    with pytest.raises(KeyFormatError):
        VerifyingKey(bytes(32), bytes(size))


@pytest.mark.parametrize("size", [0, 63, 65])
def test_verifying_keys_from_bytes_of_another_size(size: int) -> None:
    with pytest.raises(KeyFormatError):
        VerifyingKey.from_bytes(bytes(size))


KINDS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "verifying key": (str(PUBLIC), VerifyingKey.parse),
    "signing key": (to_text("ISOLATE-SIGNING-KEY-", SEED), SigningKey.parse),
    "identity": (to_text("ISOLATE-IDENTITY-", SEED), Identity.parse),
}
ALPHABET = string.ascii_letters + string.digits + "-_"


@pytest.mark.threat("KEY-10")
@pytest.mark.parametrize("kind", KINDS)
def test_every_change_of_one_character_is_refused(kind: str) -> None:
    text, parse = KINDS[kind]
    for index, letter in enumerate(text):
        for other in {*ALPHABET, "+", "/", "=", " ", "\n", "\0", "é"} - {letter}:
            with pytest.raises(KeyFormatError):
                parse(text[:index] + other + text[index + 1 :])


@pytest.mark.parametrize("kind", KINDS)
def test_every_lost_doubled_or_swapped_character_is_refused(kind: str) -> None:
    text, parse = KINDS[kind]
    for index in range(len(text)):
        lost = text[:index] + text[index + 1 :]
        doubled = text[: index + 1] + text[index:]
        swapped = text[:index] + text[index : index + 2][::-1] + text[index + 2 :]
        for changed in {lost, doubled, swapped} - {text}:
            with pytest.raises(KeyFormatError):
                parse(changed)


def test_a_changed_recipient_is_refused() -> None:
    text = str(Identity(Secret(SEED)).recipient)
    for index in range(0, len(text), 7):
        other = "A" if text[index] != "A" else "B"
        with pytest.raises(KeyFormatError):
            Recipient.parse(text[:index] + other + text[index + 1 :])


def test_white_space_around_a_key_is_taken_off() -> None:
    assert VerifyingKey.parse(f"  {PUBLIC}\n") == PUBLIC


def test_one_kind_is_not_read_as_another() -> None:
    for kind, (text, _) in KINDS.items():
        for other, (_, parse) in KINDS.items():
            if kind != other:
                with pytest.raises(KeyFormatError):
                    parse(text)


@given(st.binary(min_size=32, max_size=32))
def test_text_round_trip(raw: bytes) -> None:
    assert from_text("p-", to_text("p-", raw), 32, "key") == raw


@pytest.mark.parametrize("kind", ["signing key", "identity"])
def test_no_error_repeats_a_secret_text(kind: str, tmp_path: Path) -> None:
    text, parse = KINDS[kind]
    body = text.rsplit("-", 1)[1]
    path = tmp_path / "a.key"
    damaged = [text[:-1], text + "A", text.lower(), text[3:], body, f"{text} {text}"]
    for one in damaged:
        with pytest.raises(KeyFormatError) as caught:
            parse(one)
        assert body[:8].lower() not in str(caught.value).lower()
        assert caught.value.__suppress_context__ or caught.value.__context__ is None
    path.write_text(f"{text}\n{text}\n")
    with pytest.raises(KeyFormatError) as caught:
        read_key_file(path, kind)
    assert body[:8] not in str(caught.value)


def test_a_signing_key_is_not_shown_copied_or_pickled() -> None:
    for text in (repr(KEY), str(KEY), f"{KEY}"):
        assert SEED.hex() not in text
        assert "isolate-verify-" in text
    with pytest.raises(TypeError):
        vars(KEY)


COPIES: list[Callable[[Any], Any]] = [
    copy.copy,
    copy.deepcopy,
    lambda key: copy.deepcopy([key]),
    *(lambda key, protocol=protocol: pickle.dumps(key, protocol) for protocol in range(6)),
    *(lambda key, protocol=protocol: object.__reduce_ex__(key, protocol) for protocol in range(6)),
    *(lambda key, name=name: getattr(key, name)() for name in ("__reduce__", "__getstate__", "__replace__")),
]


@pytest.mark.threat("KEY-8")
@pytest.mark.parametrize("copied", COPIES, ids=range(len(COPIES)))
def test_no_second_object_gets_the_memory_of_a_signing_key(copied: Callable[[Any], Any]) -> None:
    """The first one wipes it in its end, and the second would go on signing, with a key of zeros."""
    with pytest.raises(UsageError, match="a signing key is not copied"):
        copied(KEY)


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_a_seed_of_another_size_makes_no_key(size: int) -> None:
    with pytest.raises(UsageError, match="32 bytes"):
        SigningKey(Secret(bytes(size)))


def test_key_file_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "sign.key"
    KEY.save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert SigningKey.load(path).verifying_key == PUBLIC
    assert str(PUBLIC) in path.read_text()


def test_a_key_file_is_never_overwritten_nor_written_through_a_link(tmp_path: Path) -> None:
    path, link = tmp_path / "sign.key", tmp_path / "link.key"
    KEY.save(path)
    link.symlink_to(tmp_path / "elsewhere.key")
    for taken in (path, link):
        with pytest.raises(StorageError, match="exists"):
            OTHER.save(taken)
    assert SigningKey.load(path).verifying_key == PUBLIC
    assert not (tmp_path / "elsewhere.key").exists()


def test_a_full_disk_leaves_no_half_written_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space"):
        KEY.save(tmp_path / "sign.key")
    assert list(tmp_path.iterdir()) == []


def test_key_files_that_hold_no_key(tmp_path: Path) -> None:
    path = tmp_path / "a.key"
    for content in (b"", b"# only a comment\n", b"\xff\xfe\n", b"one\ntwo\n", bytes(100_000)):
        path.write_bytes(content)
        with pytest.raises(KeyFormatError):
            SigningKey.load(path)
    with pytest.raises(StorageError):
        SigningKey.load(tmp_path / "missing.key")
    for path in (tmp_path, "a\0b", "/\ud800"):
        with pytest.raises(StorageError):
            SigningKey.load(path)
        with pytest.raises(StorageError):
            KEY.save(path)
    with pytest.raises(StorageError):
        write_key_file(tmp_path / "no" / "such.key", "comment", "line")
    with pytest.raises(KeyFormatError):
        SigningKey.load("/dev/zero")
