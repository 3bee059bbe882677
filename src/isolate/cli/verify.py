"""`isolate verify EVIDENCE`: is it authentic, and with a policy, is it admitted? Offline.

>>> from isolate.cli.verify import decode, moment
>>> decode(b"01ff\\n"), decode(b"Af8=\\n"), decode(b"\\x01\\xff")
(b'\\x01\\xff', b'\\x01\\xff', b'\\x01\\xff')
>>> moment("2026-06-01")
1780272000
"""

from __future__ import annotations

import base64
import binascii
import datetime
import json
import re
import time
from pathlib import Path
from typing import Any

import click

from isolate.attestation import verifiers
from isolate.attestation.appraisal import Mode, compare
from isolate.attestation.claims import LATEST, VerifiedClaims
from isolate.attestation.evidence import MAX_COLLATERAL, MAX_EVIDENCE, MAX_PIECES, Part
from isolate.attestation.policy import MAX_POLICY, Policy
from isolate.errors import AppraisalRefused, EvidenceRefused, RefusedError, StorageError, UsageError

_MAX_FILE = 4 * MAX_EVIDENCE  # hex doubles it, and JSON wraps base64
_NO_RUNTIME = "binding, nonce, purpose and slot: evidence alone was given, without its runtime map"
_NOT_APPRAISED = "authentic, not appraised: no policy was given"


def command(name: str) -> click.Command:
    return verify_command


def decode(data: bytes) -> bytes:
    """Binary evidence of a file that holds it as it is, in hex or in base64. JSON stays as it is."""
    try:
        text = re.sub(r"\s", "", data.decode("ascii"))
    except UnicodeDecodeError:
        return data
    if not text or text[0] in "[{":
        return data
    if re.fullmatch(r"(0x)?([0-9a-fA-F]{2})+", text):
        return bytes.fromhex(text.removeprefix("0x"))
    plain = text.replace("-", "+").replace("_", "/").rstrip("=")
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except binascii.Error:
        return data


def moment(text: str) -> int:
    """Unix seconds of a date, a date-time (UTC where it names no offset) or a number. Raises UsageError."""
    try:
        if text.isdecimal():
            seconds = int(text)
        else:
            stamp = datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))
            seconds = int((stamp if stamp.tzinfo else stamp.replace(tzinfo=datetime.UTC)).timestamp())
    except (ValueError, OverflowError):
        seconds = -1
    if not 0 <= seconds < LATEST:
        raise UsageError("--at takes a date, a date-time, unix seconds, or the word evidence")
    return seconds


def _read(path: str, limit: int) -> bytes:
    try:
        with Path(path).open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from None
    if len(data) > limit:
        raise EvidenceRefused(f"{Path(path).name} has more than {limit} bytes", code="evidence_size")
    return data


def _report(at: int, kind: str, claims: VerifiedClaims | None, reasons: list[str], ok: bool) -> dict[str, Any]:
    body: dict[str, Any] = {
        "verified": ok,
        "kind": kind,
        "at": datetime.datetime.fromtimestamp(at, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "measurements": {},
        "debug": None,
        "tcb": {},
        "not_checked": [],
        "reasons": reasons,
    }
    if claims is not None:
        tcb: dict[str, Any] = dict(claims.tcb)
        if claims.status is not None:
            tcb |= {"status": claims.status, "advisories": list(claims.advisories)}
        body["measurements"] = {name: value.hex() for name, value in claims.measurements.items()}
        body["debug"], body["tcb"], body["not_checked"] = claims.debug, tcb, list(claims.not_checked)
    return body


def _judge(
    part: Part, at: int, policy: Policy | None, mode: Mode
) -> tuple[VerifiedClaims | None, list[str], RefusedError | None]:
    """Claims, reasons, and the refusal if there is one."""
    if policy is None:
        try:
            claims = verifiers.find(part.kind)(part.evidence, at=at, collateral=part.collateral)
        except RefusedError as error:
            return None, [error.message], error
        return claims, [_NOT_APPRAISED], None
    claims_or_none, checks = compare(part, policy=policy, at=at, mode=mode)
    failed = [one for one in checks if not one.passed]
    if claims_or_none is None:
        # Without authentic claims every later check fails too, and says nothing new.
        failed = [one for one in failed if one.number <= 3]
    reasons = [str(one) for one in failed]
    if not failed:
        return claims_or_none, [f"admitted by policy {policy.lineage}, sequence {policy.sequence}"], None
    names = ", ".join(f"appraisal_{one.name.replace('-', '_')}" for one in failed[:1])
    return claims_or_none, reasons, AppraisalRefused("; ".join(reasons), code=names)


@click.command("verify")
@click.argument("evidence", type=click.Path(exists=True, dir_okay=False))
@click.option("--kind", required=True, type=click.Choice(verifiers.kinds()), help="What it is evidence of.")
@click.option(
    "--collateral",
    multiple=True,
    metavar="F",
    type=click.Path(exists=True, dir_okay=False),
    help="Certificates (PEM or DER) for sev-snp, dcap-qvl's JSON for tdx. Any number of times.",
)
@click.option("--at", "when", metavar="TIME", help="A date, or the word evidence: the document's own time (nitro).")
@click.option("--policy", "policy_file", metavar="P", type=click.Path(exists=True, dir_okay=False), help="TOML.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def verify_command(
    evidence: str, kind: str, collateral: tuple[str, ...], when: str | None, policy_file: str | None, as_json: bool
) -> None:
    """Verify EVIDENCE (a file: binary, base64 or hex) offline, and appraise it where a policy is given.

    Without a policy the answer is "authentic, not appraised": it says who signed, not whether to trust it.
    """
    if len(collateral) > MAX_PIECES:
        raise UsageError(f"at most {MAX_PIECES} pieces of collateral")
    if when == "evidence" and kind not in verifiers.TIMED:
        raise UsageError("--at evidence is for nitro: this kind of evidence states no time of its own")
    at = int(time.time()) if when in (None, "evidence") else moment(when or "")
    policy = None
    if policy_file is not None:
        policy = Policy.from_toml(_read(policy_file, MAX_POLICY).decode("utf-8", errors="replace"))
    claims: VerifiedClaims | None = None
    try:
        raw = decode(_read(evidence, _MAX_FILE))
        if when == "evidence":
            at = verifiers.own_time(kind, raw)
        part = Part(kind, raw, tuple(_read(one, MAX_COLLATERAL) for one in collateral))
        claims, reasons, refusal = _judge(part, at, policy, Mode.REPLAY if when == "evidence" else Mode.LIVE)
    except RefusedError as error:
        reasons, refusal = [error.message], error
    body = _report(at, kind, claims, reasons, refusal is None)
    if policy is not None and claims is not None:
        body["not_checked"].append(_NO_RUNTIME)
    if as_json:
        click.echo(json.dumps(body, indent=2))
    elif refusal is None:
        click.echo("\n".join(_lines(body)))
    if refusal is not None:
        if not as_json:
            raise refusal
        raise click.exceptions.Exit(1)


def _lines(body: dict[str, Any]) -> list[str]:
    lines = [f"{body['reasons'][0]} ({body['kind']}, at {body['at']})"]
    lines += [f"  {name:<12} {value}" for name, value in body["measurements"].items()]
    lines += [f"  {'debug':<12} {'yes' if body['debug'] else 'no'}"]
    lines += [f"  {name:<12} {value}" for name, value in body["tcb"].items()]
    return lines + [f"  not checked: {one}" for one in body["not_checked"]]
