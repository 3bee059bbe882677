"""Wycheproof through our own calls: the edge cases on which implementations of these primitives broke."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from isolate.crypto import signing
from isolate.crypto.aead import Cipher, Suite
from isolate.crypto.exchange import CurveKey
from isolate.crypto.kdf import hkdf
from isolate.crypto.secret import Secret
from isolate.crypto.signing import Purpose
from isolate.errors import MalformedError, UsageError

Load = Callable[..., list[tuple[dict[str, Any], dict[str, Any]]]]


def raw(test: dict[str, Any], name: str) -> bytes:
    return bytes.fromhex(test[name])


def test_aes_gcm(wycheproof: Load) -> None:
    cases = wycheproof(
        "aes_gcm_test.json",
        results={"valid": 229, "invalid": 87},
        flags={
            "Ktv", "Pseudorandom", "SpecialCase", "ModifiedTag", "SmallIv", "CounterWrap", "LongIv", "ZeroLengthIv"
        },
    )  # fmt: skip
    ours = 0
    for group, test in cases:
        key, nonce, data = raw(test, "key"), raw(test, "iv"), raw(test, "aad")
        sealed = raw(test, "ct") + raw(test, "tag")
        if group["keySize"] != 256:
            with pytest.raises(UsageError):
                Cipher(Suite.AES_256_GCM, Secret(key))
            continue
        cipher = Cipher(Suite.AES_256_GCM, Secret(key))
        if group["ivSize"] != 96:
            with pytest.raises(UsageError):
                cipher.open(sealed, nonce, data)
            continue
        ours += 1
        opened = cipher.open(sealed, nonce, data)
        if test["result"] == "valid":
            assert opened == raw(test, "msg"), test["tcId"]
            assert cipher.seal(raw(test, "msg"), nonce, data) == sealed, test["tcId"]
        else:
            assert opened is None, test["tcId"]
    assert ours == 66


def test_ed25519_as_verify_calls_it(wycheproof: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """The vectors sign bare messages, so the frame is taken off; everything else is the path of verify()."""
    monkeypatch.setattr(signing, "_framed", lambda purpose, message: message)
    cases = wycheproof(
        "ed25519_test.json",
        results={"valid": 88, "invalid": 63},
        flags={
            "Valid", "InvalidSignature", "TruncatedSignature", "SignatureWithGarbage", "CompressedSignature",
            "InvalidEncoding", "SignatureMalleability", "Ktv", "InvalidKtv", "TinkOverflow",
        },
    )  # fmt: skip
    for group, test in cases:
        public = raw(group["publicKey"], "pk")
        answer = signing.verify(public, Purpose.GRANT, raw(test, "msg"), raw(test, "sig"))
        assert answer is (test["result"] == "valid"), test["tcId"]


def test_x25519_refuses_a_shared_secret_of_zeros(wycheproof: Load) -> None:
    """The channel calls exchange(); X-Wing meets the same primitive inside HPKE."""
    cases = wycheproof(
        "x25519_test.json",
        results={"valid": 264, "acceptable": 254},
        flags={
            "Normal", "Twist", "SpecialPublicKey", "SmallPublicKey", "LowOrderPublic", "ZeroSharedSecret",
            "NonCanonicalPublic", "Ktv", "EdgeCaseShared", "EdgeCaseMultiplication", "EdgeCasePrivateKey",
        },
    )  # fmt: skip
    zeros = 0
    for _, test in cases:
        key, public = CurveKey(Secret(raw(test, "private"))), raw(test, "public")
        if "ZeroSharedSecret" in test["flags"]:
            zeros += 1
            with pytest.raises(MalformedError):
                key.exchange(public)
        else:
            assert key.exchange(public).equals(raw(test, "shared")), test["tcId"]
    assert zeros == 31


def test_hkdf_sha256(wycheproof: Load) -> None:
    cases = wycheproof(
        "hkdf_sha256_test.json",
        results={"valid": 83, "invalid": 3},
        flags={"EmptySalt", "Normal", "MaximalOutputSize", "SizeTooLarge", "OutputCollision"},
    )
    for _, test in cases:
        arguments = raw(test, "salt"), raw(test, "ikm"), raw(test, "info"), test["size"]
        if test["result"] == "valid":
            assert hkdf(*arguments) == raw(test, "okm"), test["tcId"]
        else:
            with pytest.raises(UsageError):
                hkdf(*arguments)


@pytest.mark.parametrize("change", ["flag", "result", "count"])
def test_the_loader_fails_on_what_it_does_not_know(
    wycheproof: Load, vectors: Path, tmp_path: Path, change: str
) -> None:
    body = json.loads((vectors / "wycheproof" / "hkdf_sha256_test.json").read_text())
    group = body["testGroups"][0]
    if change == "flag":
        group["tests"][0]["flags"] = ["SomethingNew"]
    elif change == "result":
        group["tests"][0]["result"] = "acceptable"
    else:
        del group["tests"][0]
    (tmp_path / "changed.json").write_text(json.dumps(body))
    with pytest.raises(pytest.fail.Exception):
        wycheproof(
            "changed.json",
            folder=tmp_path,
            results={"valid": 83, "invalid": 3},
            flags={"EmptySalt", "Normal", "MaximalOutputSize", "SizeTooLarge", "OutputCollision"},
        )
