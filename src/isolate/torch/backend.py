"""The backend "isolate" of torch.distributed: registering it, and whose identity a group speaks with.

    >>> import torch.distributed as dist
    >>> import isolate.torch
    >>> dist.Backend.backend_capability["isolate"]
    ['cpu', 'cuda']

``pg_options=`` takes whatever is Peers: an attested Workload, above all. Without it the enclave attests itself,
once, with ``isolate.join()``; a process that is no enclave is refused, and told how to start.
"""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from isolate.errors import ControlMissing, UsageError
from isolate.torch.links import Peers

NAME = "isolate"
HINT = "start each rank as an enclave: torchrun --no-python ... isolate launch --service URL train.py"

_lock = threading.Lock()
# Whose identity the groups of this process have: the default group's, and then its sub-groups' too.
_current: list[Peers] = []


def register() -> None:
    """Tell torch.distributed that there is a backend of this name. Twice does no harm."""
    if NAME in dist.Backend.backend_list:
        return
    dist.Backend.register_backend(NAME, create, extended_api=True, devices=["cpu", "cuda"])


def create(options: Any, pg_options: Peers | None = None) -> dist.ProcessGroup:
    """What init_process_group and new_group call. Raises ControlMissing, UsageError, RankFailed."""
    from isolate.torch.process_group import IsolateProcessGroup

    timeout: timedelta = options.timeout
    ranks = tuple(options.global_ranks_in_group) or tuple(range(options.group_size))
    return IsolateProcessGroup(
        options.store,
        options.group_rank,
        options.group_size,
        peers=_peers(pg_options, default=not options.global_ranks_in_group),
        group=str(options.group_id),
        ranks=ranks,
        timeout=timeout.total_seconds(),
    )


def _peers(given: Any, *, default: bool) -> Peers:
    """The identity to speak with: what was given, that of the default group, or a new attestation."""
    with _lock:
        if given is not None:
            if not isinstance(given, Peers):
                raise UsageError(
                    f"pg_options is a {type(given).__name__}", hint="give the Workload of isolate.join()"
                )
            if default:
                _current[:] = [given]
            return given
        if not _current:
            _current.append(_join())
        return _current[0]


def _join() -> Peers:
    from isolate.enclave.workload import join

    try:
        return join()
    except ControlMissing as error:
        raise ControlMissing(
            f"the backend 'isolate' joins attested ranks only: {error.message}", code=error.code, hint=HINT
        ) from None
