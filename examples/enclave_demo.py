"""An enclave from end to end, in one file: the same file is the host's script and the enclave's code.

Run it: python examples/enclave_demo.py
The owner seals a table of salaries; a simulated enclave opens it; an analyst gets means and never sees a row.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import isolate
from isolate.enclave.operations import Integer, Scalar, operation
from isolate.enclave.runtime import Server

# Inside the enclave -------------------------------------------------------------------------------------------


@operation(inputs={"department": Integer(0, 3)}, output=Scalar(0, 200_000, 200))
def mean_salary(view, department):
    rows = view["salary"][view["department"] == department]
    return rows.mean() if len(rows) >= 10 else 0  # fewer than ten people: the same answer as nobody


def inside():
    with isolate.join() as workload:  # attests, and gets a slot; keys come only to this measurement
        table = isolate.sealed.load_file(workload.locate("acme/salaries"), identity=workload)
        Server(workload, "acme/salaries", table, [mean_salary]).run()


# Outside: the owner, the operator and an analyst --------------------------------------------------------------


@contextlib.contextmanager
def running(ready, *command):
    """A background process, once it has printed ``ready``."""
    with subprocess.Popen(
        [sys.executable, "-m", *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            while ready not in (line := process.stdout.readline()):
                if not line:
                    raise SystemExit(f"{command[0]} did not start")
            yield
        finally:
            process.terminate()


def outside(folder):
    from isolate.attestation.policy import Policy, Reference
    from isolate.client.owner import Owner
    from isolate.crypto import x509
    from isolate.launch.measure import measure
    from isolate.launch.supervisor import Host

    # The owner has a root key, and an application whose configuration names it.
    key, recovery = isolate.SigningKey.generate(), isolate.Identity.generate()
    key.save(folder / "owner.key")
    app = folder / "app"
    app.mkdir()
    (app / "main.py").write_text(Path(__file__).read_text())
    (app / "isolate.toml").write_text(
        f'[owner]\nroot = "{key.verifying_key}"\nlineage = "acme"\n'
        '[enclave]\npurpose = "statistics"\njob = "acme/statistics"\nINSECURE_accept_simulated = true\n'
    )
    service, platform, enclave = (f"unix:{folder}/{name}" for name in ("service", "platform", "enclave"))
    serve = ["isolate", "serve", "--state", f"{folder}/state", "--listen", service, "--init", f"{folder}/owner.key"]
    serve += ["--passphrase-file", f"{folder}/passphrase"]  # made there, and opens the service's own keys
    with (
        running("serving on", *serve, "--lineage", "acme", "--recovery", str(recovery.recipient)),
        running("ready", "isolate.launch.platform", "--state", f"{folder}/platform-state", "--listen", platform),
    ):
        host, owner = Host(platform, logs=folder), Owner(key, service=service, lineage="acme")
        # The policy names the measurement, computed offline, and accepts the simulated platform: INSECURE.
        reference = Reference("statistics", "simulated", measure(app).registers)
        anchor = x509.fingerprint(host.root_certificate())
        policy = {"references": (reference,), "simulated_anchors": (anchor,), "INSECURE_accept_simulated": True}
        owner.set_policy(Policy(lineage="acme", sequence=1, **policy))
        owner.set_rule("acme/salaries", readers=["statistics"])
        # Sealed to the service, and to an offline key of the owner's; the operator keeps the file.
        random, sealed_file = np.random.default_rng(1), folder / "acme-salaries.sealed"
        table = {"department": random.integers(0, 3, 500), "salary": random.integers(30_000, 150_000, 500)}
        recipients = [owner.certificate.sealing_recipient(), recovery.recipient]
        isolate.sealed.save_file(table, sealed_file, recipients=recipients, sign=key, model_id="acme/salaries")
        owner.register(sealed_file)
        # The operator launches the enclave; the platform measures it, the service gives it the key.
        where = {"ISOLATE_SERVICE": service, "ISOLATE_ASSETS": str(folder), "ISOLATE_LISTEN": enclave}
        print(host.launch("statistics", app, where).event("serving", "failed", timeout=60))
        # The analyst holds a handle: one operation, three uses.
        analyst_key = isolate.SigningKey.generate()
        file = owner.grant(
            "acme/salaries", operations={"mean_salary": mean_salary.digest}, uses=3, enclave=enclave,
            holder=analyst_key.verifying_key.ed25519, job="acme/statistics", INSECURE_accept_simulated=True,
        )  # fmt: skip
        with isolate.attach(file, signer=analyst_key) as handle:
            for department in (0, 1, 2, 0):
                try:
                    mean = handle.invoke("mean_salary", department=department)
                    print(f"department {department}: {mean} thousand on average")
                except isolate.errors.BudgetExhausted as error:
                    print(f"department {department}: refused, {error.code}")


if __name__ == "__main__":
    if "ISOLATE_APPLICATION" in os.environ:
        inside()
    else:
        with tempfile.TemporaryDirectory() as folder:
            outside(Path(folder))
