"""What the operator, a thief and a curious user try in the demo. Nothing here is needed to use the library."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from isolate import channel, sealed
from isolate.attestation.evidence import Envelope, KeyDigests, Runtime, Slot
from isolate.capability.invocation import Invocation, hash_arguments
from isolate.capability.token import Token
from isolate.client.connect import certificate, expect_enclave
from isolate.client.handle import Handle, HandleFile
from isolate.crypto import cbor
from isolate.crypto.kem import Identity, Recipient
from isolate.crypto.signing import SigningKey, VerifyingKey
from isolate.errors import UsageError
from isolate.launch.root import SimulatedRoot
from isolate.messages.attest import AttestAnswer, AttestRequest, Challenge, ChallengeRequest
from isolate.messages.base import Refusal
from isolate.messages.http import error_of, post
from isolate.messages.invoke import Invoke, Reply, encode_argument
from isolate.transparency import Checkpoint, sign_checkpoint


def flip_a_bit(source: Path, target: Path) -> None:
    """One bit, in the ciphertext of a tensor: the header area of 64 KiB is before it."""
    changed = bytearray(source.read_bytes())
    changed[64 * 1024 + 100] ^= 1
    target.write_bytes(changed)


def seal_as_a_stranger(tensors: Mapping[str, Any], recipients: Sequence[Recipient], target: Path) -> Path:
    """A well-formed file, to the right recipients, by somebody who is not the owner."""
    other = {name: np.zeros_like(value) for name, value in tensors.items()}
    sealed.save_file(other, target, recipients=recipients, sign=SigningKey.generate(), model_id="digits/weights")
    return target


def change_one_line(application: Path, target: Path) -> Path:
    """The trainer, with one line of its main.py changed."""
    folder = target.with_name("modified-source")
    shutil.copytree(application, folder)
    main = folder / "main.py"
    text = main.read_text(encoding="utf-8")
    line = '        listener = workload.listen("gradients", rank=1) if rank == 0 else None\n'
    if line not in text:
        raise UsageError("the demo's trainer has changed: its line to change is not there")
    main.write_text(text.replace(line, '        return workload.report("admitted", rank=rank)\n'), encoding="utf-8")
    return folder


def claim_a_measurement(service: str, registers: Mapping[str, bytes]) -> str:
    """Evidence with the good registers, signed by a root that the thief made."""
    keys = {"hpke": Identity.generate().recipient.raw, "channel": secrets.token_bytes(32)}
    keys["sign"] = SigningKey.generate().verifying_key.to_bytes()
    challenge = post(
        service, "challenge", ChallengeRequest(secrets.token_bytes(32), "digits/trainer", 6), Challenge
    )
    runtime = Runtime(
        kind="simulated",
        nonce=challenge.nonce,
        keys_digest=KeyDigests.of(keys).digest,
        purpose="trainer",
        slot=Slot(challenge.job, challenge.rank, challenge.generation),
    )
    pcrs = {int(name[3:]): value for name, value in registers.items()}
    document = SimulatedRoot.generate().module("thief").document(pcrs, runtime.binding(), runtime.nonce)
    envelope = Envelope(kind="simulated", evidence=document, collateral=(), runtime=runtime)
    return post(service, "attest", AttestRequest(envelope.encode(), keys), AttestAnswer).token


def replay(service: str, record: Path) -> str:
    """The first attest request that the operator recorded on the wire, sent once more: it was a good one."""
    # By number: by name, service-10 comes before service-9, and may be that of the modified enclave.
    for path in sorted(record.glob("service-*.up"), key=lambda path: int(path.stem.rpartition("-")[2])):
        head, _, body = path.read_bytes().partition(b"\r\n\r\n")
        if b"POST /v1/attest" in head:
            return post(service, "attest", AttestRequest.parse(body), AttestAnswer).token
    raise UsageError("no attest request was recorded")


def invoke_anyway(handle: Handle, operation: str, digest: bytes, **arguments: Any) -> Any:
    """What a client does that was changed to skip its own check of the scope."""
    return handle._send(operation, digest, arguments)


def use_a_stolen_token(file: HandleFile, digest: bytes, **arguments: Any) -> Any:
    """The handle file of somebody else, with a key of one's own."""
    thief, token = SigningKey.generate(), Token.from_text(file.token)
    found = certificate(file.service, VerifyingKey.parse(file.owner), file.lineage)
    expect = expect_enclave(found, job=file.job, least_sequence=0, INSECURE_accept_simulated=True)
    encoded = {name: encode_argument(value) for name, value in arguments.items()}
    holder = channel.Holder(key=thief)
    with channel.connect(file.enclave, identity=holder, expect=expect, profile="client", purpose="invoke") as wire:
        # As a client signs that was changed to take itself for the holder.
        claimed: Any = SimpleNamespace(id=token.id, holder=thief.verifying_key.ed25519)
        invocation = Invocation.sign(
            claimed, thief, operation="classify", operation_digest=digest,
            argument_hash=hash_arguments(cbor.encode(encoded)), channel_binding=wire.binding,
            nonce=secrets.token_bytes(16), counter=1,
        )  # fmt: skip
        wire.send(Invoke(token.encode(), invocation.encode(), encoded).encode())
        reply = Reply.parse(bytes(wire.recv()))
    if reply.code:
        raise error_of(Refusal(reply.code, "the enclave refused the thief", "", reply.request_id))
    return reply.value


def fork(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint of the same log and size over another history, as a log that lies would sign it."""
    key, root = SigningKey.generate(), bytes(byte ^ 255 for byte in checkpoint.root)
    note = sign_checkpoint(key, checkpoint.origin, checkpoint.size, root)
    return Checkpoint.verify(note, checkpoint.origin, key.verifying_key.ed25519)
