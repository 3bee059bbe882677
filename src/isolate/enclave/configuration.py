"""The measured configuration of an application: isolate.toml, beside its main.py.

    >>> Configuration.parse('[owner]\\nroot = "x"\\n')
    Traceback (most recent call last):
    ...
    isolate.errors.UsageError: isolate.toml lacks lineage

What decides stands here, inside the measurement; the environment (ISOLATE_*) only says where things are.
Spec: docs/spec/evidence.md, section on applications.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any, Self

from attrs import field, frozen

from isolate.crypto.signing import VerifyingKey
from isolate.errors import ControlMissing, UsageError


@frozen
class Configuration:
    """``owner``: the root that certifies the service; ``parameters``: the application's own settings."""

    owner: VerifyingKey
    lineage: str
    purpose: str
    job: str
    INSECURE_accept_simulated: bool
    parameters: dict[str, Any] = field(factory=dict)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises UsageError or KeyFormatError."""
        try:
            tables = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError):
            raise UsageError("isolate.toml is no TOML") from None
        unknown = set(tables) - {"parameters", *_TABLES}
        if unknown:
            raise UsageError(f"isolate.toml has unknown tables: {', '.join(sorted(unknown))}")
        owner, enclave, parameters = (_table(tables, name) for name in ("owner", "enclave", "parameters"))
        lineage, root = _text(owner, "lineage"), VerifyingKey.parse(_text(owner, "root"))
        simulated = enclave.get("INSECURE_accept_simulated", False)
        if not isinstance(simulated, bool):
            raise UsageError("INSECURE_accept_simulated is true or false")
        return cls(
            owner=root,
            lineage=lineage,
            purpose=_text(enclave, "purpose"),
            job=_text(enclave, "job"),
            INSECURE_accept_simulated=simulated,
            parameters=parameters,
        )

    @classmethod
    def of_this_enclave(cls) -> Self:
        """The one beside the running application. Raises ControlMissing outside an enclave."""
        folder = os.environ.get("ISOLATE_APPLICATION")
        if folder is None:
            raise ControlMissing(
                "this process was not launched as an enclave",
                hint="start it with `isolate launch APP --service URL`",
            )
        try:
            text = Path(folder, "isolate.toml").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise UsageError("isolate.toml cannot be read") from None
        return cls.parse(text)


# A misspelt field would otherwise be a setting that silently does not hold.
_TABLES = {"owner": {"root", "lineage"}, "enclave": {"purpose", "job", "needs", "INSECURE_accept_simulated"}}


def _table(tables: dict[str, Any], name: str) -> dict[str, Any]:
    table = tables.get(name, {})
    if not isinstance(table, dict):
        raise UsageError(f"{name} in isolate.toml is no table")
    if name in _TABLES and (unknown := set(table) - _TABLES[name]):
        raise UsageError(f"[{name}] in isolate.toml has unknown fields: {', '.join(sorted(unknown))}")
    return table


def _text(table: dict[str, Any], name: str) -> str:
    value = table.get(name)
    if not isinstance(value, str) or not value:
        raise UsageError(f"isolate.toml lacks {name}")
    return value
