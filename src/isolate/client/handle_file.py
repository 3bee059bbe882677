"""A handle as a file: the token, and where to go with it. It holds no key.

    >>> HandleFile.parse('token = 1')
    Traceback (most recent call last):
    ...
    isolate.errors.UsageError: token in a handle file is missing, or is no str

It says where to go and whose root to believe, like any client configuration: keep it from being changed. Whoever
reads it learns the asset, the operations, the limits and the public keys of the holders; to use it takes the key.
"""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Self

from attrs import field, frozen

from isolate.crypto.signing import write_new_file
from isolate.errors import StorageError, UsageError

_FIELDS = {
    "token": str, "owner": str, "lineage": str, "service": str, "enclave": str, "job": str,
    "INSECURE_accept_simulated": bool,
}  # fmt: skip
MAX_FILE = 64 * 1024  # bytes of a handle file; a token takes at most 5.5 KiB of them


@frozen
class HandleFile:
    """The token with what a client needs to use it: TOML, one line a field. It may be pickled and copied."""

    token: str = field(repr=lambda token: f"<{len(token)} characters>")
    owner: str
    lineage: str
    service: str
    enclave: str
    job: str
    INSECURE_accept_simulated: bool

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises UsageError."""
        try:
            fields = tomllib.loads(text)
        except (ValueError, RecursionError):
            # TOMLDecodeError is one; an integer of more than 4300 digits is another.
            raise UsageError("this is no handle file: it is no TOML") from None
        for name, kind in _FIELDS.items():
            if type(fields.get(name)) is not kind:
                raise UsageError(f"{name} in a handle file is missing, or is no {kind.__name__}")
        if unknown := set(fields) - set(_FIELDS):
            raise UsageError(f"a handle file has no {', '.join(map(repr, sorted(unknown)))}")
        return cls(**fields)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file of at most 64 KiB. Raises StorageError or UsageError."""
        try:
            with Path(path).open("rb") as file:
                raw = file.read(MAX_FILE + 1)
        except OSError as error:
            raise StorageError(f"cannot read {os.fspath(path)}: {error.strerror}") from None
        except ValueError:
            raise StorageError("cannot read the handle file: no file can have this name") from None
        if len(raw) > MAX_FILE:
            raise UsageError("this is no handle file: it is too long")
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            raise UsageError("this is no handle file: it is no text") from None
        return cls.parse(text)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a new file. Raises StorageError, also when there is one; none is left half-written."""
        try:
            data = self.to_text().encode()
        except UnicodeEncodeError:
            raise StorageError(f"cannot write {os.fspath(path)}: what it says is no text") from None
        write_new_file(path, data, mode=0o666)

    def to_text(self) -> str:
        """What ``parse`` reads."""
        lines = [f"{name} = {_quoted(getattr(self, name))}" for name, kind in _FIELDS.items() if kind is str]
        flag = "true" if self.INSECURE_accept_simulated else "false"
        return "# isolate handle\n" + "\n".join([*lines, f"INSECURE_accept_simulated = {flag}"]) + "\n"


def _quoted(text: str) -> str:
    """A TOML basic string: JSON's, but that TOML also wants DEL escaped."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
