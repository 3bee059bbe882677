"""`isolate keygen`: an identity to open sealed files with, or a signing key to seal them with.

>>> command("keygen").name
'keygen'
"""

from __future__ import annotations

import click

from isolate.crypto.kem import Identity
from isolate.crypto.signing import SigningKey


@click.command("keygen")
@click.option("--signing", is_flag=True, help="Make a signing key instead of an identity.")
@click.option("-o", "--output", required=True, metavar="F", help="Where the secret goes: a new file, mode 0600.")
def keygen(signing: bool, output: str) -> None:
    """Make a key. The last word printed is its public half: a recipient, or a verifying key."""
    if signing:
        key = SigningKey.generate()
        key.save(output)
        click.echo(f"verifying key: {key.verifying_key}")
    else:
        identity = Identity.generate()
        identity.save(output)
        click.echo(f"recipient: {identity.recipient}")


def command(name: str) -> click.Command:
    """The command of that name."""
    return {"keygen": keygen}[name]
