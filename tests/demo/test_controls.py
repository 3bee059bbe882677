"""Each control of the demo, switched off in a copy of the tree: exactly its own expectation turns false.

A demonstration that would pass without the control shows nothing. So each row here takes one control away, and
the demo must notice, by the expectation that names it and by no other.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from attrs import frozen

ROOT = Path(__file__).parents[2]


@frozen
class Control:
    """In ``file``, each ``old`` becomes its ``new``; then ``expectation`` must turn false."""

    expectation: str
    file: str
    edits: tuple[tuple[str, str], ...]


CONTROLS = {
    "policy sequence": Control(
        "old_policy_refused",
        "service/appraiser.py",
        (("if last is not None and policy.sequence <= last:", "if False:"),),
    ),
    "chunk tag and digest": Control(
        "flipped_file_refused",
        "sealed/reader.py",
        (
            (
                "if not self._tags_only and not hmac.compare_digest(self._digest_of(view[:length]), row[tag:]):",
                "if False:",
            ),
            (
                "if not compartment.cipher.open_into(whole, view[: length + tag], nonce(self._params, index)):",
                "if compartment.cipher.open_into(whole, view[: length + tag], nonce(self._params, index)) is None:",
            ),
        ),
    ),
    "origin of a file": Control(
        "stranger_file_refused", "sealed/reader.py", (("if key != facts.signer:", "if False:"),)
    ),
    "measurement": Control(
        "modified_enclave_refused",
        "attestation/appraisal.py",
        (("return _difference(known, claims.measurements)", "return True, 'anything', 'anything'"),),
    ),
    "anchor of evidence": Control(
        "self_claimed_measurement_refused",
        "attestation/verifiers/simulated.py",
        (("require(fingerprint in (anchors or ()), 4,", "require(True, 4,"),),
    ),
    "nonce used once": Control(
        "replayed_evidence_refused",
        "service/appraiser.py",
        (("        if slot.generation <= generation:\n", "        if False:\n"),),
    ),
    "simulated evidence": Control(
        "simulated_refused_in_production",
        "attestation/appraisal.py",
        (('passed = "simulated" not in tiers or case.policy.INSECURE_accept_simulated', "passed = True"),),
    ),
    "record tag": Control(
        "flipped_record_refused",
        "channel/record.py",
        (
            (
                "if not self._lane.open(sequence, pin, at, plaintext):",
                "if self._lane.open(sequence, pin, at, plaintext) is None:",
            ),
        ),
    ),
    "budget": Control(
        "eleventh_use_refused",
        "service/accounts.py",
        (("if account.uses is not None and total > account.uses:", "if False:"),),
    ),
    "scope": Control(
        "out_of_scope_refused",
        "capability/scope.py",
        (("if self.operations is None or self.operations.get(operation) != digest:", "if False:"),),
    ),
    "closed output types": Control(
        "weights_refused",
        "enclave/operations.py",
        (("return self.output.check(result)", "return result"),),
    ),
    "proof by the holder": Control(
        "stolen_token_refused",
        "capability/invocation.py",
        (
            (
                "if not verify(verified_token.holder, Purpose.INVOCATION, invocation.body, invocation.signature):",
                "if False:",
            ),
        ),
    ),
    "revocation": Control(
        "revoked_use_refused",
        "service/accounts.py",
        (('raise Revoked("this handle, or one it comes from, was revoked")', "pass"),),
    ),
    "approvals of several": Control(
        "lone_administrator_refused",
        "service/approvals.py",
        (("if len(given) < group.threshold:", "if False:"),),
    ),
    "inclusion in the log": Control(
        "log_inclusion",
        "crypto/merkle.py",
        (("return last == 0 and hmac.compare_digest(value, root)", "return True"),),
    ),
    "consistency of the log": Control(
        "log_consistency",
        "crypto/merkle.py",
        (
            (
                "hmac.compare_digest(before, old_root) and hmac.compare_digest(after, new_root)",
                "True",
            ),
        ),
    ),
    "opening of an entry": Control(
        "log_receipt",
        "messages/receipts.py",
        (('if not compare_digest(entry["commitment"], commitment(self.salt, self.details)):', "if False:"),),
    ),
    "refusals in the log": Control(
        "log_refusals", "enclave/runtime.py", (("            self._note(token, code)\n", "            pass\n"),)
    ),
    "recorder": Control(
        "all_traffic_recorded",
        "cli/demo/story.py",
        (
            (
                'Owner(world.key, service=world.address("service")',
                'Owner(world.key, service=world.behind("service")',
            ),
        ),
    ),
    "sealing of results": Control(
        "operator_saw_nothing",
        "enclave/workload.py",
        (
            (
                "        facts = sealed.public_facts(path)\n",
                "        facts = sealed.public_facts(path)\n"
                "        path.with_suffix('.plain').write_bytes(tensors['w1'].astype('<f2').tobytes())\n",
            ),
        ),
    ),
    "search": Control(
        "search_can_find", "cli/demo/search.py", (('needles.append(Needle(secret, "base64", body))', "pass"),)
    ),
}


def run_demo(source: Path) -> tuple[int, dict[str, bool], str]:
    """The demo of the tree at ``source``, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "isolate", "demo", "--json"],
        env={**os.environ, "PYTHONPATH": str(source)},
        cwd=source,
        capture_output=True,
        text=True,
        timeout=180,
    )
    body = json.loads(done.stdout) if done.stdout.startswith("{") else {}
    return (
        done.returncode,
        body.get("expectations", {}),
        done.stderr + json.dumps(body.get("details", {}), indent=1),
    )


def test_the_demo_holds() -> None:
    status, expectations, said = run_demo(ROOT / "src")
    assert status == 0, said
    assert expectations and all(expectations.values()), said
    assert {control.expectation for control in CONTROLS.values()} <= set(expectations)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTROLS)
def test_without_a_control_exactly_its_expectation_turns_false(name: str, tmp_path: Path) -> None:
    control = CONTROLS[name]
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "examples" / "data", tmp_path / "examples" / "data")
    path = tmp_path / "src" / "isolate" / control.file
    text = path.read_text(encoding="utf-8")
    for old, new in control.edits:
        assert text.count(old) == 1, f"the control {name} is not where this test looks for it: {old}"
        text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")
    status, expectations, said = run_demo(tmp_path / "src")
    assert [one for one, held in expectations.items() if not held] == [control.expectation], said
    assert status == 1, said
