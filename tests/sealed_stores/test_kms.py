"""AWS KMS over HTTP, against moto's server: a mock, which encrypts and checks the context, but no signature."""

from __future__ import annotations

import hashlib
import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isolate import KeyWrapper, SigningKey, sealed
from isolate.crypto.secret import Secret
from isolate.errors import KeyServiceRefused, KeyServiceUnavailable, Tampered, UsageError
from isolate.sealed.wrappers.kms import KmsWrapper

boto3 = pytest.importorskip("boto3", reason="boto3 is not installed")

CONTEXT = b"which file this is"
KEY = Secret(bytes(range(32)))
NOBODY = "arn:aws:kms:us-east-1:123456789012:key/00000000-0000-0000-0000-000000000000"


def POST(head: str) -> bool:
    return head.startswith("POST")


def answer(status: str, body: dict[str, str]) -> bytes:
    """One whole HTTP answer."""
    raw = json.dumps(body).encode()
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/x-amz-json-1.1\r\ncontent-length: {len(raw)}\r\n\r\n"
    return head.encode() + raw


@pytest.fixture(scope="session")
def arns(aws: Any) -> list[str]:
    """The names of two keys."""
    client = boto3.client(
        "kms", endpoint_url=aws.url, region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="x"
    )
    return [client.create_key()["KeyMetadata"]["Arn"] for _ in range(2)]


@pytest.fixture
def keys(aws: Any, arns: list[str], credentials: Callable[[str], None]) -> list[str]:
    credentials(aws.url)
    return arns


@pytest.mark.threat("SEAL-40")
def test_a_wrapped_key_opens_with_the_same_key_and_context_only(aws: Any, keys: Any) -> None:
    arn, another = keys
    wrapper = KmsWrapper(arn, endpoint_url=aws.url)
    assert isinstance(wrapper, KeyWrapper)
    box = wrapper.wrap(KEY, CONTEXT)
    assert bytes(KEY.expose()) not in box
    assert bytes(wrapper.unwrap(box, CONTEXT).expose()) == bytes(KEY.expose())
    with pytest.raises(Tampered):
        wrapper.unwrap(box, b"another file")
    with pytest.raises(Tampered):
        wrapper.unwrap(box[:-1] + bytes([box[-1] ^ 1]), CONTEXT)
    with pytest.raises((Tampered, KeyServiceRefused)):
        KmsWrapper(another, endpoint_url=aws.url).unwrap(box, CONTEXT)


def test_a_sealed_file_opens_through_kms(aws: Any, keys: Any, owner: SigningKey, tmp_path: Path) -> None:
    wrapper = KmsWrapper(keys[0], endpoint_url=aws.url)
    path = tmp_path / "model.sealed"
    sealed.save_file({"w": np.arange(5)}, path, recipients=[wrapper], sign=owner)
    opened = sealed.load_file(path, identity=wrapper, signed_by=owner.verifying_key)
    assert opened["w"].tolist() == [0, 1, 2, 3, 4]


def test_an_absent_key_is_refused(aws: Any, keys: Any) -> None:
    with pytest.raises(KeyServiceRefused) as caught:
        KmsWrapper(NOBODY, endpoint_url=aws.url).wrap(KEY, CONTEXT)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("AccessDeniedException", KeyServiceRefused),
        ("DisabledException", KeyServiceRefused),
        ("KMSInvalidStateException", KeyServiceRefused),
        ("UnrecognizedClientException", KeyServiceRefused),
        ("InvalidCiphertextException", Tampered),
        ("IncorrectKeyException", Tampered),
        ("KeyUnavailableException", KeyServiceUnavailable),
        ("ThrottlingException", KeyServiceUnavailable),
    ],
)
def test_each_refusal_of_kms_has_its_error(aws: Any, keys: Any, proxied: Any, code: str, error: type) -> None:
    """moto has no policies and no disabled keys, so its proxy answers what KMS is documented to answer."""
    proxy = proxied(
        aws, fault=answer("400 Bad Request", {"__type": code, "message": "private detail"}), chosen=POST
    )
    with pytest.raises(error) as caught:
        KmsWrapper(keys[0], endpoint_url=proxy.url).unwrap(b"box", CONTEXT)
    assert "private detail" not in str(caught.value)


@pytest.mark.threat("SEAL-40")
@pytest.mark.parametrize("body", [{}, {"KeyId": NOBODY, "Plaintext": "AAAA"}], ids=["empty", "another-key"])
def test_an_answer_about_another_key_is_refused(aws: Any, keys: Any, proxied: Any, body: dict[str, str]) -> None:
    proxy = proxied(aws, fault=answer("200 OK", body), chosen=POST)
    with pytest.raises(KeyServiceRefused, match="another key"):
        KmsWrapper(keys[0], endpoint_url=proxy.url).unwrap(b"box", CONTEXT)


def test_503_is_tried_again_and_then_said(aws: Any, keys: Any, proxied: Callable[..., Any]) -> None:
    arn, _ = keys
    proxy = proxied(aws, fault="503", times=1, chosen=POST)
    wrapper = KmsWrapper(arn, endpoint_url=proxy.url)
    assert bytes(wrapper.unwrap(wrapper.wrap(KEY, CONTEXT), CONTEXT).expose()) == bytes(KEY.expose())
    assert proxy.broken == 1
    proxy.times = None
    with pytest.raises(KeyServiceUnavailable):
        wrapper.wrap(KEY, CONTEXT)


def test_a_silent_kms_costs_no_more_than_the_timeout(keys: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        wrapper = KmsWrapper(keys[0], timeout=0.9, endpoint_url=f"http://127.0.0.1:{silent.getsockname()[1]}")
        begin = time.monotonic()
        with pytest.raises(KeyServiceUnavailable):
            wrapper.wrap(KEY, CONTEXT)
        assert time.monotonic() - begin < 2.0


def test_no_credentials(aws: Any, keys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(KeyServiceRefused, match="credentials"):
        KmsWrapper(keys[0], endpoint_url=aws.url).wrap(KEY, CONTEXT)


def test_the_log_of_the_account_sees_a_hash_of_the_context(aws: Any, keys: Any, proxied: Any) -> None:
    proxy = proxied(aws)
    KmsWrapper(keys[0], endpoint_url=proxy.url).wrap(KEY, CONTEXT)
    (body,) = map(json.loads, proxy.bodies)
    assert body["EncryptionContext"] == {"isolate": hashlib.sha256(CONTEXT).hexdigest()}


@pytest.mark.parametrize(
    "name", ["alias/models", "1234abcd", "arn:aws:kms:eu-west-1:111122223333:alias/models", ""]
)
def test_only_the_arn_of_a_key_names_it(name: str) -> None:
    with pytest.raises(UsageError, match="ARN"):
        KmsWrapper(name)
