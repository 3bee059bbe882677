"""`isolate log verify`: check a service's transparency log from outside, and remember how far.

>>> sorted(command("log").commands)
['verify']
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import click

from isolate.client.audit import Auditor, Report
from isolate.client.connect import certificate
from isolate.client.shown import as_plain, plain
from isolate.crypto.signing import VerifyingKey
from isolate.errors import LogRefused, MalformedError
from isolate.messages.http import fetch
from isolate.messages.receipts import UseReceipt
from isolate.transparency.checkpoint import Checkpoint, Witness
from isolate.transparency.keeping import is_before, read_checkpoint, write_checkpoint


@click.group("log")
def log_group() -> None:
    """The transparency log of a service."""


def command(name: str) -> click.Group:
    return log_group


@log_group.command("verify")
@click.option("--service", required=True, metavar="ADDRESS", help="unix:/path or tcp:host:port.")
@click.option(
    "--owner", required=True, metavar="VERIFYING_KEY", help="The owner's root, who certified the service."
)
@click.option("--lineage", default="default", show_default=True, help="The lineage of the service's policies.")
@click.option("--remember", metavar="F", help="The last believed checkpoint: read, and replaced when all is well.")
@click.option("--witness", "witnesses", multiple=True, metavar="NAME+ID+KEY", help="A witness's C2SP verifier key.")
@click.option("--quorum", type=click.IntRange(0), help="How many of the witnesses must have signed. [default: all]")
@click.option("--accept-epoch", type=click.IntRange(2), metavar="N", help="The owner told you of this recovery.")
@click.option(
    "--receipt", "receipts", multiple=True, metavar="F", help="A use that must stand in the log (repeat)."
)
@click.option("--json", "as_json", is_flag=True, help="The machine form.")
def verify(
    service: str,
    owner: str,
    lineage: str,
    remember: str | None,
    witnesses: tuple[str, ...],
    quorum: int | None,
    accept_epoch: int | None,
    receipts: tuple[str, ...],
    as_json: bool,
) -> None:
    """Check the log's checkpoint, that it only grew since the remembered one, and every entry since then.

    A log that was forked or cut back is refused; what it showed is then kept beside the remembered checkpoint: the
    two together prove it. Without witnesses, a log that shows others another history is seen only by comparing.
    """
    known = [Witness.parse(text) for text in witnesses]
    uses = {path: UseReceipt.load(path) for path in receipts}
    wanted = len(known) if quorum is None else quorum
    found = certificate(service, VerifyingKey.parse(owner), lineage)
    before: str | None = None  # what was remembered of the log before a recovery
    text = None if remember is None else read_checkpoint(remember)
    if remember is not None and text is not None and is_before(text, found.name, found.epoch):
        if accept_epoch != found.epoch:
            raise LogRefused(
                f"the owner recovered this service: its log goes on as {found.origin}, and entries may be missing",
                code="log_recovered",
                hint=f"ask the owner; if that is so, say --accept-epoch {found.epoch}",
            )
        text, before = None, text
    auditor = Auditor(
        lambda path, most: fetch(service, f"/log/{path}", most=most),
        origin=found.origin,
        public=found.log_key.ed25519,
        remembered=text,
        witnesses=known,
        quorum=wanted,
    )
    try:
        report = auditor.run()
        for path, use in uses.items():
            _find(auditor, path, use, found.release_key, report.checkpoint)
    except LogRefused as error:
        if remember is not None and auditor.shown is not None and error.code != LogRefused.default_code:
            evidence = f"{remember}.refused"
            write_checkpoint(evidence, auditor.shown.text)
            error.hint = f"what it showed is in {evidence}: keep both"
        raise
    if remember is not None:
        if before is not None:
            kept = f"{remember}.before-{found.epoch}"
            write_checkpoint(kept, before)
            click.echo(f"what was remembered of the log before is in {kept}: keep it", err=True)
        write_checkpoint(remember, report.checkpoint.text)
    _print(report, uses, remember, bool(known), as_json)


def _find(auditor: Auditor, path: str, use: UseReceipt, key: VerifyingKey, at: Checkpoint) -> None:
    try:
        auditor.find(use, key, at)
    except (LogRefused, MalformedError) as error:
        error.message = f"{path}: {error.message}"
        raise


def _print(
    report: Report, uses: Mapping[str, UseReceipt], remember: str | None, watched: bool, as_json: bool
) -> None:
    seen = report.checkpoint
    if as_json:
        found = {path: {"entry": use.settled.log_index, **as_plain(use.about)} for path, use in uses.items()}
        body = {
            "receipts": found,
            "origin": seen.origin, "size": seen.size, "root": seen.root.hex(), "remembered": report.old,
            "new": seen.size - (report.old or 0), "kinds": dict(report.kinds), "witnessed": dict(seen.witnessed),
        }  # fmt: skip
        click.echo(json.dumps(body, indent=2))
        return
    if report.old is None:
        click.echo(f"{seen.origin}: {seen.size} entries, all checked; nothing was remembered before")
    else:
        click.echo(f"{seen.origin}: {seen.size} entries; the {report.old} remembered ones stand, the rest checked")
    for kind, count in report.kinds.items():
        click.echo(f"{count:>8} {kind}")
    for path, use in uses.items():
        of, index = use.about, use.settled.log_index
        ended = f"ended as {plain(of['code'])}" if of["code"] else "a result"
        click.echo(f"{path}: entry {index}, a use of {plain(of['asset'])}: {of['bytes_out']} bytes, {ended}")
    for name in seen.witnessed:
        click.echo(f"witnessed by {name}")
    if not watched:
        click.echo("no witness was asked for: compare with others to see that they are shown the same log")
    if remember is None:
        click.echo("nothing was remembered: give --remember F to see a log that is cut back or forked")
    else:
        click.echo(f"remembered in {Path(remember)}")
