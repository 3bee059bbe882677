"""`isolate serve`: the attestation service."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import time
from pathlib import Path

import click

from isolate.errors import MissingExtra


def command(name: str) -> click.Command:
    return serve_command


@click.command("serve")
@click.option("--state", required=True, type=click.Path(file_okay=False), help="The folder of the service's state.")
@click.option(
    "--listen", "address", default="tcp:127.0.0.1:8440", show_default=True, help="unix:/path or tcp:host:port."
)
@click.option(
    "--init", "owner_key", metavar="OWNER.key", help="First make the state, certified by this signing key."
)
@click.option(
    "--name", "service_name", default="isolate", show_default=True, help="With --init: the service's name."
)
@click.option("--lineage", default="default", show_default=True, help="With --init: the lineage of its policies.")
@click.option("--checkpoint", metavar="F", help="Where the log's newest checkpoint is kept, outside the state.")
@click.option("--recovery", multiple=True, metavar="RECIPIENT", help="With --init: an offline recovery recipient.")
def serve_command(
    state: str,
    address: str,
    owner_key: str | None,
    service_name: str,
    lineage: str,
    checkpoint: str | None,
    recovery: tuple[str, ...],
) -> None:
    """Appraise evidence, release keys, keep budgets and the log, under the owner's policy.

    With --checkpoint, a state that lacks entries which that file shows is an old copy, and is not served.

    Logs are lines of JSON on standard error. They carry codes and request ids, never data.
    """
    import structlog

    from isolate.crypto.kem import Recipient
    from isolate.crypto.signing import SigningKey
    from isolate.service.head import Head
    from isolate.service.routes import Service
    from isolate.service.state import State, create

    try:
        from isolate.service import app
    except ImportError:
        raise MissingExtra(
            "the service needs starlette and uvicorn", hint="pip install 'isolate-confidential[service]'"
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

    def clock() -> int:
        return int(time.time())

    if owner_key:
        certificate = create(
            Path(state),
            owner=SigningKey.load(owner_key),
            name=service_name,
            lineage=lineage,
            recovery=[Recipient.parse(text) for text in recovery],
            now=clock(),
        )
        click.echo(f"recipient: {certificate.sealing_recipient()}")
    # The server answers what it has begun and then raises the signal again: an exception, so that all is closed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with State(state, clock=clock) as opened, contextlib.ExitStack() as undo:
        service = Service(opened)
        if checkpoint:
            undo.enter_context(Head(opened, service.log, Path(checkpoint), first=bool(owner_key)))
        app.serve(service, address, ready=lambda: click.echo(f"serving on {address}"))
