"""`isolate seal`, `unseal`, `inspect` and `rewrap`: safetensors files in, sealed files out, and back.

>>> [command(name).name for name in ("seal", "unseal", "inspect", "rewrap")]
['seal', 'unseal', 'inspect', 'rewrap']
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from isolate import sealed
from isolate.cli.unlock import read_passphrase
from isolate.crypto.aead import Suite
from isolate.crypto.kem import Identity, Recipient
from isolate.crypto.signing import SigningKey
from isolate.errors import KeyFormatError, NoRecipient, StorageError, UsageError
from isolate.sealed.folder import folder_size
from isolate.sealed.folder_manifest import is_folder, manifest_of
from isolate.sealed.objects import is_url
from isolate.sealed.recipients import Passphrase

_SUITES = {suite.title.lower(): suite for suite in Suite}


class _Signer(click.ParamType[str, str]):
    """A verifying key as text, or a file whose last word is one."""

    name = "verifying key"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return text_or_file(str(value), "isolate-verify-")


def text_or_file(value: str, prefix: str) -> str:
    """The public key itself, or the one in a file that names it (a key file does, or what keygen printed)."""
    if value.startswith(prefix):
        return value
    try:
        words = Path(value).read_text(encoding="ascii", errors="replace")[:65536].split()
    except OSError:
        raise KeyFormatError(f"{value[:80]} is neither a key that begins with {prefix} nor a file") from None
    found = [word for word in words if word.startswith(prefix)]
    if not found:
        raise KeyFormatError(f"{value[:80]} names no key that begins with {prefix}")
    return found[-1]


def _identities(files: Sequence[str], passphrase: str | None) -> list[Identity | Passphrase]:
    found: list[Identity | Passphrase] = [Identity.load(file) for file in files]
    if passphrase is not None:
        found.append(read_passphrase(passphrase))
    if not found:
        raise UsageError("give an identity (-i) or a passphrase (--passphrase-file)")
    return found


def _recipients(texts: Sequence[str], passphrase: str | None) -> list[Recipient | Passphrase]:
    found: list[Recipient | Passphrase] = [
        Recipient.parse(text_or_file(text, "isolate-recipient-")) for text in texts
    ]
    if passphrase is not None:
        found.append(read_passphrase(passphrase))
    return found


class _Any:
    """The first of several identities that a stanza is for."""

    def __init__(self, identities: Sequence[Identity | Passphrase]) -> None:
        self._identities = identities

    def unlock(self, facts: sealed.PublicFacts) -> sealed.FileKey:
        for identity in self._identities[:-1]:
            try:
                return sealed.open_file_key(facts, identity)
            except NoRecipient:
                continue
        return sealed.open_file_key(facts, self._identities[-1])


def _expect(digest: str | None, epoch: int | None) -> bytes | sealed.Epoch | None:
    if digest is not None and epoch is not None:
        raise UsageError("give --expect or --epoch, not both: a digest says more")
    if digest is None:
        return None if epoch is None else sealed.Epoch(epoch)
    try:
        raw = bytes.fromhex(digest)
    except ValueError:
        raw = b""
    if len(raw) != 32:
        raise UsageError("--expect takes a file digest: 64 hex digits, as `isolate seal` prints it")
    return raw


@contextmanager
def _progress(title: str, size: int | None) -> Iterator[Callable[[int], None] | None]:
    """A bar on a terminal, nothing in a pipe."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=size)
        yield lambda done: bar.update(task, completed=done)


def _size(path: str) -> int | None:
    """Bytes of a file, or of the weights in a folder; None where only a store knows."""
    if is_url(path):
        return None
    if Path(path).is_dir():
        return folder_size(path)
    try:
        return Path(path).stat().st_size
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from None


@click.command("seal")
@click.argument("model", metavar="MODEL.safetensors|DIR")
@click.option("-r", "--recipient", "recipients", multiple=True, metavar="R", help="Who can open it (repeat).")
@click.option("--passphrase-file", metavar="F", help="Seal to the first line of F instead (- asks).")
@click.option("--sign", "sign_file", required=True, metavar="F", help="The owner's signing key.")
@click.option("-o", "--output", required=True, metavar="F|URL", help="The sealed file or folder.")
@click.option("--model-id", default="", help="A public name for it.")
@click.option("--epoch", default=0, type=click.IntRange(0), help="A public number that only grows.")
@click.option("--previous", metavar="F", help="The sealed file that this one follows.")
@click.option("--suite", type=click.Choice(list(_SUITES)), help="Default: by the CPU.")
@click.option(
    "--compartment", "compartments", multiple=True, metavar="ID=GLOB", help="Tensors to release by themselves."
)
def seal(
    model: str, recipients: tuple[str, ...], passphrase_file: str | None, sign_file: str, output: str,
    model_id: str, epoch: int, previous: str | None, suite: str | None, compartments: tuple[str, ...],
) -> None:  # fmt: skip
    """Seal a safetensors file, or a folder with all that is in it. Prints the digest that `unseal --expect` takes.

    A URL is s3://, gs://, az:// or memory://; credentials come from the environment.
    """
    globs: dict[str, list[str]] = {}
    for text in compartments:
        name, equals, glob = text.partition("=")
        if not equals:
            raise UsageError("--compartment takes ID=GLOB")
        globs.setdefault(name, []).append(glob)
    to = _recipients(recipients, passphrase_file)
    options: dict[str, Any] = {"compartments": globs} if globs else {}
    folder = Path(model).is_dir()
    if folder and globs:
        raise UsageError("--compartment goes with one file: a folder's weights are released as a whole")
    with _progress("seal", _size(model)) as progress:
        digest = (sealed.seal_folder if folder else sealed.seal_file)(
            model, output, recipients=to, sign=SigningKey.load(sign_file), model_id=model_id, epoch=epoch,
            previous=sealed.public_facts(manifest_of(previous)).digest if previous else None,
            suite=_SUITES[suite] if suite else None, progress=progress, **options,
        )  # fmt: skip
    if len(to) == 1 and isinstance(to[0], Recipient):
        click.echo("isolate: warning: one recipient only: who loses that key loses the model", err=True)
    click.echo(f"sealed {output}, digest: {digest.hex()}")


@click.command("unseal")
@click.argument("file", metavar="F.sealed|DIR|URL")
@click.option("-i", "--identity", "identities", multiple=True, metavar="F", help="A key file (repeat).")
@click.option("--passphrase-file", metavar="F", help="The passphrase is the first line of F (- asks).")
@click.option("--signed-by", type=_Signer(), metavar="KEY", help="Who must have sealed it.")
@click.option("--expect", metavar="HEX", help="The digest that it must have.")
@click.option("--epoch", type=click.IntRange(0), help="The least epoch that it must have (with --signed-by).")
@click.option("-o", "--output", required=True, metavar="F", help="The plain file or folder, mode 0600.")
def unseal(
    file: str, identities: tuple[str, ...], passphrase_file: str | None, signed_by: str | None, expect: str | None,
    epoch: int | None, output: str,
) -> None:  # fmt: skip
    """Open a sealed file or folder into a plain one. Refused means that nothing is written."""
    who = _identities(identities, passphrase_file)
    folder = is_folder(file)
    with _progress("unseal", None if folder else _size(file)) as progress:
        (sealed.unseal_folder if folder else sealed.unseal_file)(
            file, output, identity=_Any(who), signed_by=signed_by, expect=_expect(expect, epoch), progress=progress
        )
    click.echo(f"opened {file} into {output}")


@click.command("inspect")
@click.argument("file", metavar="F.sealed|DIR|URL")
@click.option("-i", "--identity", "identities", multiple=True, metavar="F", help="Show the tensors too.")
@click.option("--passphrase-file", metavar="F", help="The passphrase is the first line of F (- asks).")
@click.option("--signed-by", type=_Signer(), metavar="KEY", help="Who must have sealed it.")
@click.option("--expect", metavar="HEX", help="The digest that it must have.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def inspect(
    file: str, identities: tuple[str, ...], passphrase_file: str | None, signed_by: str | None, expect: str | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Show what anyone can read of a sealed file; with a key, the tensors as well.

    Reads header and footer, not the data. Without --signed-by or --expect nothing says who sealed it.
    """
    pins: dict[str, Any] = {"signed_by": signed_by, "expect": _expect(expect, None)}
    file = str(manifest_of(file))
    body: dict[str, Any]
    if identities or passphrase_file:
        who = _Any(_identities(identities, passphrase_file))
        pinned = bool(signed_by or expect)
        with sealed.SealedReader(file, identity=who, INSECURE_any_origin=not pinned, **pins) as reader:
            body = _public(reader.facts)
            body["metadata"] = dict(reader.metadata)
            body["tensors"] = [
                {"name": name, "dtype": p.entry.dtype, "shape": list(p.entry.shape), "compartment": p.compartment}
                for name, p in reader.places.items()
            ]
    else:
        facts = sealed.public_facts(file)
        pinned = sealed.check_origin(facts, **pins)
        body = _public(facts)
    body["origin"] = "checked" if pinned else "not checked: compare signer or digest"
    if as_json:
        click.echo(json.dumps(body, indent=2))
        return
    tensors = body.pop("tensors", [])
    for key, value in body.items():
        click.echo(f"{key:<14} {value if isinstance(value, str | int) else json.dumps(value)}")
    for row in tensors:
        click.echo(f"{row['dtype']:<8} {row['shape']!s:<20} {row['compartment']:<12} {row['name']!r}")


def _public(facts: sealed.PublicFacts) -> dict[str, Any]:
    contents = facts.contents
    return {
        "digest": facts.digest.hex(),
        "signer": str(facts.signer),
        "model_id": facts.model_id,
        "epoch": facts.epoch,
        "previous": facts.previous.hex() if facts.previous else None,
        "suite": contents.params.suite.title,
        "chunk_size": contents.params.chunk_size,
        "generation": facts.generation,
        "recipients": [f"{stanza.type} ({stanza.label})" for stanza in facts.slot.stanzas],
        "compartments": {row.id: row.length for row in contents.rows[1:]},
    }


@click.command("rewrap")
@click.argument("file", metavar="F.sealed|DIR|URL")
@click.option("-i", "--identity", "identities", multiple=True, metavar="F", help="A key file that opens it now.")
@click.option("--passphrase-file", metavar="F", help="The passphrase that opens it now (- asks).")
@click.option("-r", "--recipient", "recipients", multiple=True, metavar="R", help="Who can open it from now on.")
@click.option("--to-passphrase-file", metavar="F", help="From now on it opens with the first line of F.")
def rewrap(
    file: str, identities: tuple[str, ...], passphrase_file: str | None, recipients: tuple[str, ...],
    to_passphrase_file: str | None,
) -> None:  # fmt: skip
    """Replace the recipients, in place. Data, digest and signature stay; who held the key still holds it."""
    who = _identities(identities, passphrase_file)
    file = str(manifest_of(file))
    sealed.rewrap(file, identity=_Any(who), recipients=_recipients(recipients, to_passphrase_file))
    facts = sealed.public_facts(file)
    click.echo(f"rewrapped {file} for {len(facts.slot.stanzas)} recipients, generation {facts.generation}")


def command(name: str) -> click.Command:
    """The command of that name."""
    return {"seal": seal, "unseal": unseal, "inspect": inspect, "rewrap": rewrap}[name]
