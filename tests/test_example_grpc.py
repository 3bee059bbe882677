"""A stock gRPC cluster under certificates of attested enclaves, as examples/grpc_cluster.py runs it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "grpc_cluster.py"


@pytest.mark.slow
@pytest.mark.threat("SVC-61")
def test_a_stock_grpc_cluster_runs_and_refuses_who_is_not_of_it(tmp_path: Path) -> None:
    pytest.importorskip("grpc", reason="needs grpcio, the extra 'grpc'")
    done = subprocess.run(
        [sys.executable, EXAMPLE], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=180
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout
    assert "without a certificate: refused: UNAVAILABLE" in said
    assert "with one of its own making: refused: UNAVAILABLE" in said
    assert re.search(r"of another trust domain: .*spiffe://rival\.simulated/.*refused: UNAVAILABLE", said)
    # The same server, all the while, to a workload of the job; each end renewed twice at least, no call was lost.
    assert max(map(int, re.findall(r"rank 1: certificate (\d+) here", said))) >= 3
    assert re.search(r"'done', 'calls': \d+, 'refused': 0", said)
