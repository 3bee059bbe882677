"""Handles in the workers of torch's DataLoader, as docs/handles.md shows it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from isolate.crypto.signing import SigningKey

pytest.importorskip("torch", reason="the extra `torch` is not installed")

PROGRAM = """
import sys
import torch
import isolate
from isolate.client import connect
from isolate.client.handle import HandleFile

method, path, agent, now = sys.argv[1:]
connect.now = lambda: int(now)

class Labels(torch.utils.data.Dataset):
    def __init__(self, file, signer):
        self._file, self._signer, self._handle = file, signer, None

    def __len__(self):
        return 6

    def __getitem__(self, index):
        if self._handle is None:
            self._handle = isolate.attach(self._file, signer=self._signer)
        return self._handle.invoke("op", number=index)

    def __getstate__(self):
        return vars(self) | {"_handle": None}

if __name__ == "__main__":
    labels = Labels(HandleFile.load(path), isolate.AgentSigner(agent))
    assert labels[5] == 5
    loader = torch.utils.data.DataLoader(labels, batch_size=3, num_workers=2, multiprocessing_context=method)
    print([batch.tolist() for batch in loader])
"""


@pytest.mark.threat("HND-6")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_each_worker_of_a_data_loader_attaches(
    method: str, house: Any, key: SigningKey, agent: Any, tmp_path: Path
) -> None:
    house.grant(key).save(tmp_path / "team.handle")
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "program.py", method, "team.handle", agent(key).address, str(house.realm.clock())]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout == "[[0, 1, 2], [3, 4, 5]]\n", done.stderr
    assert house.channels == 3
