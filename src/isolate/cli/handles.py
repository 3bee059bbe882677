"""`isolate grant`, `delegate`, `invoke`, `revoke` and `handle show|receipt`: what an owner and a holder type.

>>> [command(name).name for name in ("grant", "delegate", "invoke", "revoke")]
['grant', 'delegate', 'invoke', 'revoke']

Mode: handle. No key stands in an argument: `--sign` and `--signer` take a key file, or an agent's address.
"""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import click

from isolate.capability.token import Token, verify
from isolate.cli import limits
from isolate.client.handle import Handle, HandleFile, attach
from isolate.client.owner import Owner
from isolate.client.shown import as_plain, plain, scope_of
from isolate.client.shown import limits as shown_limits
from isolate.client.signers import open_signer
from isolate.crypto.signing import SigningKey, VerifyingKey
from isolate.errors import CapabilityRefused, IsolateError, StorageError, UsageError
from isolate.messages.receipts import UseReceipt

_SIGNER = click.option(
    "--signer", required=True, metavar="F|unix:PATH", help="The holder's key file, or the address of its agent."
)


@click.command("grant")
@click.argument("asset")
@click.option(
    "--operation", "operations", multiple=True, required=True, metavar="NAME=DIGEST", help="What may run (repeat)."
)
@click.option("--holder", required=True, metavar="KEY", help="Whose handle it is: a verifying key.")
@limits.limit_options
@click.option("--sign", "sign_file", required=True, metavar="F", help="The owner's signing key.")
@click.option("--service", required=True, metavar="ADDRESS", help="Where the attestation service is.")
@click.option("--enclave", required=True, metavar="ADDRESS", help="Where the asset's enclave listens for clients.")
@click.option("--job", required=True, help="The job of that enclave.")
@click.option("--lineage", default="default", show_default=True, help="The lineage of the owner's policies.")
@click.option(
    "--epoch", type=click.IntRange(1), metavar="N", help="The service's epoch. [default: the service is asked]"
)
@click.option(
    "--INSECURE-accept-simulated", "simulated", is_flag=True, help="The holder takes a simulated enclave for one."
)
@click.option("-o", "--output", required=True, metavar="F", help="The handle file: a new one. It holds no key.")
def grant(
    asset: str, operations: tuple[str, ...], holder: str, sign_file: str, service: str, enclave: str, job: str,
    lineage: str, epoch: int | None, simulated: bool, output: str, **given: Any,
) -> None:  # fmt: skip
    """Make a handle on ASSET: offline, with --epoch. The last word printed is its id.

    `isolate measure APP --operations FILE` prints names and digests of an application's operations.
    """
    owner = Owner(SigningKey.load(sign_file), service=service, lineage=lineage)
    file = owner.grant(
        asset, operations=limits.operations(operations), holder=limits.holder(holder), enclave=enclave, job=job,
        epoch=epoch, INSECURE_accept_simulated=simulated, **limits.scope_limits(given),
    )  # fmt: skip
    if given["uses"] is None or given["bytes_out"] is None:
        missing = " and ".join(
            f"--{name.replace('_', '-')}" for name in ("uses", "bytes_out") if given[name] is None
        )
        click.echo(f"isolate: warning: without {missing} nothing bounds how much is learned through it", err=True)
    file.save(output)
    click.echo(f"granted {output}, handle: {Token.from_text(file.token).id.hex()}")


@click.command("delegate")
@click.argument("file", metavar="F.handle")
@_SIGNER
@click.option("--holder", metavar="KEY", help="Whose it will be: a verifying key. [default: the same holder's]")
@click.option("--operations", multiple=True, metavar="NAME,...", help="Only these of its operations (repeat).")
@limits.limit_options
@click.option("-o", "--output", required=True, metavar="F", help="The new handle file. It holds no key.")
def delegate(
    file: str, signer: str, holder: str | None, operations: tuple[str, ...], output: str, **given: Any
) -> None:
    """Narrow a handle and pass it on, offline; nothing can be widened. The last word printed is its id."""
    names = [name for text in operations for name in text.split(",") if name]
    mine = open_signer(signer)
    with attach(file, signer=mine) as handle:
        narrowed = handle.attenuate(
            operations=names or None,
            holder=limits.holder(holder) if holder else mine.verifying_key.ed25519,
            **limits.scope_limits(given),
        )
    narrowed.save(output)
    click.echo(f"delegated {output}, handle: {Token.from_text(narrowed.token).id.hex()}")


@click.command("invoke")
@click.argument("file", metavar="F.handle")
@click.argument("operation")
@click.argument("arguments", nargs=-1, metavar="[NAME=VALUE]...")
@_SIGNER
@click.option("--receipt", metavar="F", help="Keep the service's receipt for this use: a new file.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def invoke(
    file: str, operation: str, arguments: tuple[str, ...], signer: str, receipt: str | None, as_json: bool
) -> None:
    """Run one OPERATION of a handle in the enclave, and print its result.

    A VALUE is a number, a text, @FILE (the array of an .npy file, the reference to a derived asset in a .json file,
    else the file's bytes), or text:VALUE for a text that looks like one of these. A refusal ends with
    exit status 1, and its code.
    """
    values: dict[str, Any] = {}
    for text in arguments:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UsageError(f"an argument is NAME=VALUE, not {text[:40]!r}")
        values[name] = limits.argument(value)
    if receipt is not None and (os.path.lexists(receipt) or not Path(receipt).parent.is_dir()):
        # Now: the use would be charged before.
        raise StorageError(f"{receipt} exists already, or cannot be made", hint="choose another name")
    with attach(file, signer=open_signer(signer)) as handle:
        result = as_plain(handle.invoke(operation, **values))
        # Printed first: it is paid for, whatever becomes of the receipt.
        if as_json:
            click.echo(json.dumps({"operation": operation, "result": result}))
        else:
            click.echo(plain(result) if isinstance(result, str) else json.dumps(result))
        if receipt is not None:
            try:
                handle.receipt().save(receipt)
            except IsolateError as error:
                error.hint = f"it is of use {(handle.last_use or b'').hex()}: `isolate handle receipt` asks again"
                raise


@click.command("revoke")
@click.argument("handle", metavar="HANDLE_ID|F.handle")
@click.option("--sign", "sign_file", required=True, metavar="F", help="The owner's signing key.")
@click.option("--service", metavar="ADDRESS", help="Where the service is. [default: the handle file's]")
@click.option("--lineage", help="The lineage of the owner's policies. [default: the handle file's, or default]")
def revoke(handle: str, sign_file: str, service: str | None, lineage: str | None) -> None:
    """End a handle, and every one that was narrowed from it. What is printed last is its place in the log."""
    if re.fullmatch(r"[0-9a-fA-F]{64}", handle):
        revoked = bytes.fromhex(handle)
    else:
        file = HandleFile.load(handle)
        revoked = Token.from_text(file.token).id
        service, lineage = service or file.service, lineage or file.lineage
    if service is None:
        raise UsageError("where is the service?", hint="--service ADDRESS")
    owner = Owner(SigningKey.load(sign_file), service=service, lineage=lineage or "default")
    index = owner.revoke(revoked)
    click.echo(f"revoked {revoked.hex()}, log entry: {index}")


@click.group("handle")
def handle_group() -> None:
    """Handle files."""


@handle_group.command("show")
@click.argument("file", metavar="F.handle")
@click.option(
    "--signer", metavar="F|unix:PATH", help="Ask the service what is left: the holder's key file or agent."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def show(file: str, signer: str | None, as_json: bool) -> None:
    """Show what a handle allows, by whom it was passed on, and (with --signer) what is left of it.

    The signatures are checked under the owner's key that the file itself names: compare it with the one you know.
    """
    content = HandleFile.load(file)
    token = Token.from_text(content.token)
    body = _facts(content, token)
    if signer is not None:
        with attach(content, signer=open_signer(signer)) as handle:
            body["left"] = _left(handle)
    if as_json:
        click.echo(json.dumps(body, indent=2))
        return
    for name, value in body.items():
        if name == "operations":
            for operation, digest in value.items():
                click.echo(f"{'operation':<12} {operation} {digest}")
        elif name == "chain":
            for number, link in enumerate(value):
                click.echo(f"{'holder' if number else 'granted to':<12} {link['holder']} handle {link['handle']}")
        elif name in ("limits", "left"):
            for said in value if isinstance(value, list) else [f"{left} {key}" for key, left in value.items()]:
                click.echo(f"{'limit' if name == 'limits' else 'left':<12} {said}")
        elif name == "standing" and value == "good" and signer is None:
            click.echo(f"{name:<12} good, as far as the file says (--signer asks whether it was revoked)")
        else:
            click.echo(f"{name.replace('_', ' '):<12} {plain(str(value))}")


@handle_group.command("receipt")
@click.argument("file", metavar="F.handle")
@click.argument("use", metavar="USE_ID|F.receipt")
@_SIGNER
@click.option("-o", "--output", required=True, metavar="F", help="The receipt: a new file.")
def receipt_again(file: str, use: str, signer: str, output: str) -> None:
    """Ask for the service's receipt of a use, by its id, or again by the receipt that there was.

    The use was made through this handle, or one that was narrowed from it.
    """
    named = re.fullmatch(r"[0-9a-fA-F]{64}", use)
    wanted = bytes.fromhex(use) if named else UseReceipt.load(use).settled.invocation
    with attach(file, signer=open_signer(signer)) as handle:
        handle.receipt(wanted).save(output)
    click.echo(f"receipt for {wanted.hex()} in {output}")


def _facts(file: HandleFile, token: Token) -> dict[str, Any]:
    scope = scope_of(token)
    try:
        verify(token, VerifyingKey.parse(file.owner).ed25519, now=int(time.time()))
        standing = "good"
    except CapabilityRefused as error:
        standing = error.code
    return {
        "asset": token.asset,
        "handle": token.id.hex(),
        "epoch": token.claims[0].epoch,
        "standing": standing,
        "owner": file.owner,
        "lineage": file.lineage,
        "service": file.service,
        "enclave": file.enclave,
        "job": file.job,
        "simulated": "accepted: INSECURE" if file.INSECURE_accept_simulated else "refused",
        "operations": {name: digest.hex() for name, digest in sorted((scope.operations or {}).items())},
        "limits": [said for _, said in shown_limits(scope, None)],
        "passed_on": f"{len(token.blocks) - 1} times, {scope.depth} more allowed",
        "chain": [
            {"holder": claim.holder.hex(), "handle": handle.hex()}
            for claim, handle in zip(token.claims, token.handles, strict=True)
        ],
    }


def _left(handle: Handle) -> dict[str, Any]:
    budget = handle.budget
    return {
        "uses": "any number of" if budget.uses is None else budget.uses,
        "bytes_out": "any number of" if budget.bytes_out is None else budget.bytes_out,
    }


def command(name: str) -> click.Command:
    """The command of that name."""
    return {"grant": grant, "delegate": delegate, "invoke": invoke, "revoke": revoke, "handle": handle_group}[name]
