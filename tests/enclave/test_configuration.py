"""The measured configuration: whatever stands in it is understood, or the enclave does not start."""

from __future__ import annotations

import pytest

from isolate.crypto.signing import SigningKey
from isolate.enclave.configuration import Configuration
from isolate.errors import UsageError

ROOT = SigningKey.generate().verifying_key
GOOD = f'[owner]\nroot = "{ROOT}"\nlineage = "l"\n[enclave]\npurpose = "p"\njob = "j"\n'


def test_a_good_one() -> None:
    found = Configuration.parse(GOOD + "INSECURE_accept_simulated = true\n[parameters]\nseed = 3\n")
    assert (found.owner, found.lineage, found.purpose, found.job) == (ROOT, "l", "p", "j")
    assert found.INSECURE_accept_simulated
    assert found.parameters == {"seed": 3}
    assert not Configuration.parse(GOOD).INSECURE_accept_simulated


@pytest.mark.threat("ENC-15")
@pytest.mark.parametrize(
    "text",
    [
        "no toml", "owner = 3", "[[owner]]", "parameters = 1\n" + GOOD, GOOD + "[more]\n", GOOD + "extra = 1\n",
        GOOD + "INSECURE_accept_simulated = 1\n", GOOD + "insecure_accept_simulated = true\n",
        GOOD.replace('"j"', "5"), GOOD.replace('"p"', '""'), GOOD.replace(str(ROOT), "isolate-verify-x"),
        "a = " + "[" * 5000, "", GOOD.replace("[enclave]", "[enclaves]"),
    ],
)  # fmt: skip
def test_a_misspelt_setting_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        Configuration.parse(text)
