"""`isolate serve`: the attestation service."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import sys
from pathlib import Path
from typing import Any

import click

from isolate.cli.signals import end_once
from isolate.errors import ControlMissing, MissingExtra, StorageError, UsageError

_RATE = "Requests a second of one peer (an address, or a user of a Unix socket), twice as many at once; 0: any."
_OPENAPI = "Print the description of the service, and end. Needs no state."


def command(name: str) -> click.Command:
    return serve_command


def _print_openapi(context: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked and not context.resilient_parsing:
        from isolate.service.openapi import description

        click.echo(json.dumps(description(), indent=2))
        context.exit()


def _set_aside(checkpoint: str, epoch: int) -> None:
    """What the log showed before a recovery is evidence; the file itself is for the log of this epoch."""
    try:
        Path(checkpoint).rename(f"{checkpoint}.before-{epoch}")
    except OSError as error:
        raise StorageError(
            f"cannot move {checkpoint}: {error.strerror}",
            hint="the state is recovered: mend that, and run the same again, which begins one more epoch",
        ) from None


@click.command("serve")
@click.option("--state", required=True, type=click.Path(file_okay=False), help="The folder of the service's state.")
@click.option(
    "--listen",
    "address",
    default="tcp:127.0.0.1:8440",
    show_default=True,
    help="unix:/path, tls:host:port, or tcp:host:port for this machine only.",
)
@click.option("--tls-cert", metavar="F", help="With tls: certificate in PEM. Without, one is made and kept.")
@click.option("--tls-key", metavar="F", help="With --tls-cert: its private key in PEM.")
@click.option("--rate", type=click.FloatRange(min=0), default=200, show_default=True, help=_RATE)
@click.option("--openapi", is_flag=True, is_eager=True, expose_value=False, callback=_print_openapi, help=_OPENAPI)
@click.option("--init", metavar="OWNER.key", help="First make the state, certified by this signing key.")
@click.option("--rotate", metavar="OWNER.key", help="First make new keys, certified for 90 more days.")
@click.option(
    "--recover",
    metavar="OWNER.key",
    help="First begin another epoch, on a state that is an old copy.",
)
@click.option(
    "--passphrase-file", metavar="F", help="Opens the service's keys. With --init it is made when it is not there."
)
@click.option("--key-service", metavar="URI", help="Opens the service's keys: kms:ARN or pkcs11:... instead.")
@click.option("--recovery-identity", metavar="ID.key", help="With --rotate or --recover: opens the keys this once.")
@click.option("--new-passphrase-file", metavar="F", help="With --rotate or --recover: opens the keys from now on.")
@click.option(
    "--name", "service_name", default="isolate", show_default=True, help="With --init: the service's name."
)
@click.option("--lineage", default="default", show_default=True, help="With --init: the lineage of its policies.")
@click.option("--checkpoint", metavar="F", help="Where the log's newest checkpoint is kept, outside the state.")
@click.option("--recovery", multiple=True, metavar="RECIPIENT", help="With --init: an offline recovery recipient.")
def serve_command(
    state: str,
    address: str,
    tls_cert: str | None,
    tls_key: str | None,
    rate: float,
    init: str | None,
    rotate: str | None,
    recover: str | None,
    passphrase_file: str | None,
    key_service: str | None,
    recovery_identity: str | None,
    new_passphrase_file: str | None,
    service_name: str,
    lineage: str,
    checkpoint: str | None,
    recovery: tuple[str, ...],
) -> None:
    """Appraise evidence, release keys, keep budgets and the log, under the owner's policy.

    With --checkpoint, a state that lacks entries which that file shows is an old copy, and is not served. Its owner
    goes on with --recover: then nothing that was signed before holds, and policy, rules and files are given again.

    Logs are lines of JSON on standard error. They carry codes and request ids, never data.
    """
    import structlog

    from isolate.cli.unlock import make_passphrase, unlock
    from isolate.crypto.kem import Identity, Recipient
    from isolate.crypto.signing import SigningKey
    from isolate.enclave.boot import capabilities, harden
    from isolate.messages.http import Address
    from isolate.service import recovery as renewal
    from isolate.service.clock import SteadyClock
    from isolate.service.head import Head
    from isolate.service.routes import Service
    from isolate.service.state import State, create
    from isolate.transparency.keeping import read_checkpoint

    try:
        from isolate.service.app import Application
        from isolate.service.limits import Limits
        from isolate.service.listener import check_exposed, serve
        from isolate.service.tls import given_identity, kept_identity
    except ImportError:
        raise MissingExtra(
            "the service needs starlette, uvicorn and prometheus-client",
            hint="pip install 'isolate-confidential[service]'",
        ) from None
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )

    if sum(one is not None for one in (init, rotate, recover)) > 1:
        raise UsageError("give one of --init, --rotate and --recover")
    if (recovery_identity or new_passphrase_file) and not (rotate or recover):
        raise UsageError("--recovery-identity and --new-passphrase-file go with --rotate or --recover")
    listening = Address.parse(address)
    check_exposed(listening)
    if (tls_cert is None) is not (tls_key is None) or (tls_cert and listening.kind != "tls"):
        raise UsageError("--tls-cert and --tls-key go together, with --listen tls:host:port")
    # Before a key is read: afterwards no core, no debugger and no other process of this user sees it.
    harden()
    if missing := [name for name, holds in capabilities().items() if not holds]:
        raise ControlMissing(f"the service's process is not protected: {', '.join(missing)}")
    clock = SteadyClock()
    opener: Any = (
        Identity.load(recovery_identity)
        if recovery_identity
        else unlock(passphrase_file, key_service, make=init is not None)
    )
    if init:
        certificate = create(
            Path(state),
            owner=SigningKey.load(init),
            name=service_name,
            lineage=lineage,
            recovery=[Recipient.parse(text) for text in recovery],
            unlock=opener,
            now=clock(),
        )
        click.echo(f"recipient: {certificate.sealing_recipient()}")
    elif rotate or recover:
        new = make_passphrase(new_passphrase_file) if new_passphrase_file else None
        options: dict[str, Any] = {"unlock": opener, "new": new, "clock": clock}
        if rotate:
            renewal.rotate(state, owner=SigningKey.load(rotate), **options)
        elif recover:
            kept = read_checkpoint(checkpoint) if checkpoint else None
            certificate = renewal.recover(state, owner=SigningKey.load(recover), kept=kept, **options)
            if checkpoint and kept is not None:
                _set_aside(checkpoint, certificate.epoch)
        opener = new or opener
    # The server answers what it has begun, and then raises the signal again.
    end_once(signal.SIGTERM)
    with State(state, unlock=opener, clock=clock) as opened, contextlib.ExitStack() as undo:
        service = Service(opened)
        undo.callback(service.close)
        if checkpoint:
            undo.enter_context(Head(opened, service.log, Path(checkpoint), first=bool(init or recover)))
        identity = None
        if tls_cert and tls_key:
            identity = given_identity(tls_cert, tls_key)
        elif listening.kind == "tls":
            identity = kept_identity(opened, host=listening.host, now=clock())
        serve(
            Application(service, Limits(rate=rate)),
            listening,
            identity=identity,
            ready=lambda where: click.echo(f"serving on {where}"),
        )
