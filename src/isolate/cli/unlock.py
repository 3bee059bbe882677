"""How a command is told what opens a key: a passphrase in a file or typed, or a key in a KMS or HSM. Never in argv.

>>> from isolate.cli.unlock import key_service
>>> key_service("kms:arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab").region
'eu-central-1'
"""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote

import click

from isolate.errors import StorageError, UsageError
from isolate.sealed.recipients import Passphrase

if TYPE_CHECKING:
    from isolate.service.keyring import Unlock

SHORTEST = 12  # bytes of a passphrase that somebody chose

# Nobody guesses what was drawn at random: no work is needed to slow him down.
_RANDOM = {"memory": 8192, "passes": 1}


def read_passphrase(path: str) -> Passphrase:
    """The first line of a file, or what is typed where the path is -. Raises StorageError or UsageError."""
    if path == "-":
        return Passphrase(click.prompt("Passphrase", hide_input=True, err=True))
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise StorageError(f"cannot read the passphrase from {path}") from None
    if not lines or not lines[0]:
        raise UsageError(f"{path} holds no passphrase")
    return Passphrase(lines[0])


def make_passphrase(path: str) -> Passphrase:
    """The passphrase in the file; where there is no file, a random one, which is then in it (mode 0600).

    Raises UsageError for a file that others can read or write, or with less than 12 bytes.
    """
    if path == "-":
        return read_passphrase(path)
    text = secrets.token_urlsafe(32)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        found = _private(path)
        if len(found.text) < SHORTEST:
            raise UsageError(f"the passphrase in {path} is shorter than {SHORTEST} bytes") from None
        return found
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from None
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from None
    return Passphrase(text, **_RANDOM)


def _private(path: str) -> Passphrase:
    """The passphrase in a file that nobody else reads or writes. Raises UsageError."""
    if path != "-":
        try:
            status = Path(path).stat()
        except OSError as error:
            raise StorageError(f"cannot read the passphrase from {path}: {error.strerror}") from None
        if status.st_mode & 0o077 or status.st_uid not in (0, os.geteuid()):
            raise UsageError(f"others can read or change {path}", hint="give it mode 0600, and to this user")
    return read_passphrase(path)


def key_service(name: str) -> Any:
    """``kms:ARN``, or a URI after RFC 7512 with module-path and pin-source. Raises UsageError, MissingExtra."""
    scheme, _, rest = name.partition(":")
    if scheme == "kms":
        from isolate.sealed.wrappers.kms import KmsWrapper

        return KmsWrapper(rest)
    if scheme != "pkcs11":
        raise UsageError("a key service is kms:ARN or pkcs11:token=T;object=K?module-path=F&pin-source=F")
    from isolate.sealed.wrappers.pkcs11 import Pkcs11Wrapper

    path, _, query = rest.partition("?")
    parts = dict(part.partition("=")[::2] for part in path.split(";"))
    more = {key: values[-1] for key, values in parse_qs(query).items()}
    if not {"token", "object"} <= set(parts) or set(more) != {"module-path", "pin-source"}:
        raise UsageError("a PKCS#11 key is named by token, object, module-path and pin-source")
    pin = read_passphrase(more["pin-source"].removeprefix("file:"))
    token, key = unquote(parts["token"]), unquote(parts["object"])
    return Pkcs11Wrapper(more["module-path"], token=token, key=key, pin=pin.text)


def unlock(passphrase_file: str | None, service: str | None, *, make: bool = False) -> Unlock:
    """What opens the keys of a service. ``make``: a passphrase file that is not there is made.

    Without either, the passphrase is asked for on a terminal. Raises UsageError where there is none.
    """
    if passphrase_file is not None and service is not None:
        raise UsageError("give --passphrase-file or --key-service, not both")
    if service is not None:
        wrapper: Unlock = key_service(service)
        return wrapper
    if passphrase_file is None and not sys.stdin.isatty():
        raise UsageError("say what opens the service's keys", hint="--passphrase-file F, or --key-service")
    return (make_passphrase if make else _private)(passphrase_file or "-")
