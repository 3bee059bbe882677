"""The owner and a service: `isolate owner policy|rule|limits|register|log`, `isolate rollback`, `isolate explain`.

>>> [command(name).name for name in ("owner", "rollback", "explain")]
['owner', 'rollback', 'explain']
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import click

from isolate import sealed
from isolate.attestation.policy import Policy
from isolate.client.owner import Owner
from isolate.client.shown import as_plain, plain
from isolate.crypto.signing import SigningKey
from isolate.errors import StorageError, UsageError
from isolate.messages.attest import Registered

F = TypeVar("F", bound=Callable[..., Any])


def of_the_owner(function: F) -> F:
    """The options that say which service, and who asks."""
    for option in (
        click.option("--sign", "key", required=True, metavar="OWNER.key", help="The owner's root signing key."),
        click.option("--service", required=True, metavar="ADDRESS", help="unix:/path, tcp:host:port or tls:..."),
        click.option("--lineage", default="default", show_default=True, help="Of the service's policies."),
    ):
        function = option(function)
    return function


def _owner(key: str, service: str, lineage: str) -> Owner:
    return Owner(SigningKey.load(key), service=service, lineage=lineage)


def _print(registered: Registered) -> None:
    click.echo(f"{registered.asset}: epoch {registered.epoch}, digest {registered.digest.hex()}")


@click.group("owner")
def owner_group() -> None:
    """What only the owner says to a service, and is told by it: policies, rules, files, the log's details."""


@owner_group.command("policy")
@click.argument("file", metavar="POLICY.toml")
@of_the_owner
def policy(file: str, key: str, service: str, lineage: str) -> None:
    """Sign a policy and put it into force. Its sequence must be above the last; its lineage is the service's."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise StorageError(f"cannot read {file}") from None
    index = _owner(key, service, lineage).set_policy(Policy.from_toml(text))
    click.echo(f"in force; entry {index} of the log")


@owner_group.command("rule")
@click.argument("asset")
@click.option(
    "--reader", "readers", multiple=True, metavar="NAME", help="A reference of the policy that may read it."
)
@click.option(
    "--writer", "writers", multiple=True, metavar="NAME", help="A reference that may make its next epoch."
)
@of_the_owner
def rule(
    asset: str, readers: tuple[str, ...], writers: tuple[str, ...], key: str, service: str, lineage: str
) -> None:
    """Say which measurements may read and write an asset, in place of what was said before."""
    index = _owner(key, service, lineage).set_rule(asset, readers=readers, writers=writers)
    click.echo(f"in force; entry {index} of the log")


@owner_group.command("limits")
@click.argument("asset")
@click.option("--uses", type=click.IntRange(0), metavar="N", help="Uses in all, by all holders.")
@click.option("--bytes-out", type=click.IntRange(0), metavar="N", help="Bytes in all that leave.")
@click.option("--holder-uses", type=click.IntRange(0), metavar="N", help="Uses in all by each holder.")
@click.option("--holder-bytes", type=click.IntRange(0), metavar="N", help="Bytes in all to each holder.")
@of_the_owner
def limits(
    asset: str, uses: int | None, bytes_out: int | None, holder_uses: int | None, holder_bytes: int | None,
    key: str, service: str, lineage: str,
) -> None:  # fmt: skip
    """Bound what handles may take from an asset over its life, in place of what was said before.

    What was used before counts. It stops a holder who makes many handles, or many keys; a limit not given is none.
    """
    index = _owner(key, service, lineage).set_limits(
        asset, uses=uses, bytes_out=bytes_out, holder_uses=holder_uses, holder_bytes=holder_bytes
    )
    click.echo(f"in force; entry {index} of the log")


@owner_group.command("register")
@click.argument("file", metavar="MODEL.sealed")
@of_the_owner
def register(file: str, key: str, service: str, lineage: str) -> None:
    """Register a sealed file as the newest epoch of its asset: only then are its keys released."""
    _print(_owner(key, service, lineage).register(file))


@owner_group.command("log")
@click.option("--from", "start", type=click.IntRange(0), default=0, metavar="N", help="The first entry to show.")
@click.option(
    "--kind", "kinds", multiple=True, metavar="KIND", help="Only these, such as use, or refused (repeat)."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object for each entry, on a line of its own.")
@of_the_owner
def log(start: int, kinds: tuple[str, ...], as_json: bool, key: str, service: str, lineage: str) -> None:
    """Show the log with what others see only a hash of: who used what, when, and what was refused.

    Every entry is looked for in the public log. What is not there, or is told otherwise, is not shown.
    """
    for entry in _owner(key, service, lineage).entries(start):
        if kinds and not any(kind in (entry.kind, entry.kind.rpartition(" ")[2]) for kind in kinds):
            continue
        details = as_plain(entry.details)
        if as_json:
            body = {"index": entry.index, "time": entry.time, "kind": entry.kind, "details": details}
            click.echo(json.dumps(body))
            continue
        said = ", ".join(f"{name} {_shown(value)}" for name, value in details.items())
        click.echo(plain(f"{entry.index:>6} {_when(entry.time)} {entry.kind}: {said}"))


def _shown(value: Any) -> str:
    return value if value and isinstance(value, str) else json.dumps(value)


def _when(seconds: int) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):
        return f"{seconds} (unix seconds)"


@click.command("rollback")
@click.argument("asset")
@click.option("--to", "digest", required=True, metavar="DIGEST", help="As `isolate inspect` prints it.")
@click.option("--file", metavar="MODEL.sealed", help="The file itself, where the service does not know it.")
@of_the_owner
def rollback(asset: str, digest: str, file: str | None, key: str, service: str, lineage: str) -> None:
    """Put an earlier file of an asset back into force. It stands in the log; later files must still be newer.

    After a recovery this is also how the owner says which file is the newest.
    """
    try:
        raw = bytes.fromhex(digest)
    except ValueError:
        raw = b""
    if len(raw) != 32:
        raise UsageError("--to takes a file digest: 64 hex digits")
    facts = None if file is None else sealed.public_facts(file)
    _print(_owner(key, service, lineage).rollback(asset, raw, facts=facts))


@click.command("explain")
@click.argument("request_id")
@click.option("--json", "as_json", is_flag=True, help="The machine form.")
@of_the_owner
def explain(request_id: str, as_json: bool, key: str, service: str, lineage: str) -> None:
    """Why a request was refused: every check of its route, with what was expected and what was found."""
    found = _owner(key, service, lineage).explain(request_id)
    if as_json:
        body = {"request_id": found.request_id, "time": found.time, "route": found.route, "code": found.code}
        click.echo(json.dumps({**body, "message": found.message, "checks": found.checks}, indent=2))
        return
    click.echo(f"{found.route} was refused at {_when(found.time)} with {found.code}: {found.message}")
    for one in found.checks:
        mark = {True: "passed", False: "FAILED", None: "not reached"}[one["passed"]]
        click.echo(f"{one['number']:>4} {one['name']:<18} {mark}")
        if one["passed"] is False:
            click.echo(f"     expected  {one['expected']}\n     found     {one['found']}")
    click.echo("docs/errors.md has what to do next for each code")


def command(name: str) -> click.Command:
    """The command of that name."""
    return {"owner": owner_group, "rollback": rollback, "explain": explain}[name]
