"""`isolate approve`, `isolate export` and `isolate approvers`: plaintext leaves when several people say so.

>>> [command(name).name for name in ("approve", "export", "approvers")]
['approve', 'export', 'approvers']

An approval is made offline, and is a file of one line. What this control covers, and what not, is in
docs/spec/service.md, section 6.5.
"""

from __future__ import annotations

import os
from pathlib import Path

import click

from isolate import sealed
from isolate.cli.sealed import text_or_file
from isolate.client.approve import Exporter, Wish, approve_export, approve_group, read_approval, read_group_approval
from isolate.client.owner import Owner
from isolate.client.signers import open_signer
from isolate.crypto.kem import Identity, Recipient
from isolate.crypto.signing import SigningKey, VerifyingKey, write_key_file
from isolate.errors import StorageError, UsageError
from isolate.messages.approve import MAX_APPROVAL

_HOUR = 3600  # seconds

_FOR = click.option(
    "--for", "service", required=True, metavar="NAME/EPOCH", help="The service that it is for (serve prints it)."
)
_SIGNER = click.option(
    "--sign", "signer", required=True, metavar="F|unix:PATH", help="The approver's signing key, or its agent."
)
_HOURS = click.option(
    "--hours", default=24, show_default=True, type=click.IntRange(1, 24 * 30), help="How long it is good."
)
_OUTPUT = click.option("-o", "--output", required=True, metavar="F", help="The approval: a new file.")


def _read(path: str) -> str:
    try:
        with Path(path).open("rb") as file:
            lines = file.read(2 * MAX_APPROVAL).decode("ascii", errors="replace").splitlines()
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from None
    return next((line for line in lines if line and not line.startswith("#")), "")


def _keys(texts: tuple[str, ...]) -> list[VerifyingKey]:
    return [VerifyingKey.parse(text_or_file(text, "isolate-verify-")) for text in texts]


def _digest(asset: str, digest: str | None, file: str | None) -> bytes:
    if (digest is None) == (file is None):
        raise UsageError("name the file by --digest, or by --file")
    if file is not None:
        facts = sealed.public_facts(file)
        if facts.model_id != asset:
            raise UsageError(f"{file} was sealed as {facts.model_id!r}")
        return facts.digest
    try:
        raw = bytes.fromhex(digest or "")
    except ValueError:
        raw = b""
    if len(raw) != 32:
        raise UsageError("a digest is 64 hexadecimal digits")
    return raw


@click.command("approve")
@click.argument("asset")
@click.option("--digest", metavar="HEX", help="Of the sealed file that may leave.")
@click.option("--file", metavar="F.sealed", help="That file itself, in place of --digest.")
@click.option("--to", "destination", required=True, metavar="RECIPIENT", help="To whom: a recipient, or its file.")
@click.option("--reason", required=True, help="Why; it stands in the log.")
@_FOR
@_SIGNER
@_HOURS
@_OUTPUT
def approve(
    asset: str, digest: str | None, file: str | None, destination: str, reason: str, service: str, signer: str,
    hours: int, output: str,
) -> None:  # fmt: skip
    """Approve, offline, that one file of ASSET leaves in plaintext, once. It takes several approvers."""
    to = Recipient.parse(text_or_file(destination, "isolate-recipient-"))
    wish = Wish(service, asset, _digest(asset, digest, file), to.raw, reason)
    text = approve_export(wish, open_signer(signer), lifetime=hours * _HOUR)
    write_key_file(output, f"isolate approval: {asset} may leave, good for {hours} hours", text)
    click.echo(f"approved {asset}, digest {wish.digest.hex()}, for {hours} hours: {output}")


@click.command("export")
@click.argument("asset")
@click.argument("file", metavar="F.sealed")
@click.option("--approval", "approvals", multiple=True, required=True, metavar="F", help="An approval (repeat).")
@click.option("-i", "--identity", required=True, metavar="F", help="The destination's key file.")
@click.option("--service", required=True, metavar="ADDRESS", help="Where the attestation service is.")
@click.option(
    "--owner", required=True, metavar="VERIFYING_KEY", help="The owner's root, who certified the service."
)
@click.option("--lineage", default="default", show_default=True, help="Of the service's policies.")
@click.option("-o", "--output", required=True, metavar="F", help="The plain file, mode 0600.")
def export(
    asset: str, file: str, approvals: tuple[str, ...], identity: str, service: str, owner: str, lineage: str,
    output: str,
) -> None:  # fmt: skip
    """Open a sealed file of ASSET with the approvals of enough people. They are used up by it."""
    given = [read_approval(_read(path)) for path in approvals]
    if any(one.asset != asset for one in given):
        raise UsageError("an approval is for another asset")
    if os.path.lexists(output):
        raise StorageError(f"{output} exists already", hint="choose another name: asking uses the approvals up")
    root = VerifyingKey.parse(text_or_file(owner, "isolate-verify-"))
    exporter = Exporter(given, Identity.load(identity), service=service, owner=root, lineage=lineage)
    sealed.unseal_file(file, output, identity=exporter)
    click.echo(f"exported {asset} into {output}")


@click.group("approvers")
def approvers() -> None:
    """Who approves exports of plaintext."""


_THRESHOLD = click.option(
    "--threshold", required=True, type=click.IntRange(2, 16), metavar="N", help="How many must approve."
)


@approvers.command("set")
@click.argument("keys", nargs=-1, required=True, metavar="VERIFYING_KEY...")
@_THRESHOLD
@click.option("--approval", "approvals", multiple=True, metavar="F", help="A present approver's word (repeat).")
@click.option("--sign", "key", required=True, metavar="OWNER.key", help="The owner's root signing key.")
@click.option("--service", required=True, metavar="ADDRESS", help="Where the attestation service is.")
@click.option("--lineage", default="default", show_default=True, help="Of the service's policies.")
def set_approvers(
    keys: tuple[str, ...], threshold: int, approvals: tuple[str, ...], key: str, service: str, lineage: str
) -> None:
    """Name the approvers. The first time the owner does; from then on only with the present ones' approvals."""
    owner = Owner(SigningKey.load(key), service=service, lineage=lineage)
    given = [read_group_approval(_read(path)) for path in approvals]
    done = owner.set_approvers(_keys(keys), threshold, approvals=given)
    click.echo(
        f"approvers of {owner.certificate.audience}: group {done.sequence}; entry {done.log_index} of the log"
    )


@approvers.command("approve")
@click.argument("keys", nargs=-1, required=True, metavar="VERIFYING_KEY...")
@_THRESHOLD
@click.option("--group", "sequence", required=True, type=click.IntRange(2), help="The new group's number.")
@_FOR
@_SIGNER
@_HOURS
@_OUTPUT
def approve_approvers(
    keys: tuple[str, ...], threshold: int, sequence: int, service: str, signer: str, hours: int, output: str
) -> None:
    """Approve, offline, as one of the present approvers, that these follow."""
    text = approve_group(
        _keys(keys), threshold, open_signer(signer), service=service, sequence=sequence, lifetime=hours * _HOUR
    )
    write_key_file(output, f"isolate approval of approvers, group {sequence}", text)
    click.echo(f"approved group {sequence}, for {hours} hours: {output}")


def command(name: str) -> click.Command:
    """The command of that name."""
    return {"approve": approve, "export": export, "approvers": approvers}[name]
