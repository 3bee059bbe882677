"""No example by itself: the owner's service, the operator's platform and an enclave, which examples share.

with Stage(folder, "acme", "statistics") as stage:
    stage.launch(application, seal)
"""

import contextlib
import importlib.util
import shutil
import subprocess
import sys

import isolate
from isolate.attestation.policy import Policy, Reference
from isolate.client.owner import Owner
from isolate.crypto import x509
from isolate.launch.measure import measure
from isolate.launch.supervisor import Host


def load(path):
    """The owner's own code, loaded on the owner's side: to learn the digests that are granted."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Stage:
    """``folder``: an empty one. ``lineage``: of the owner's policies. ``name``: of the one application."""

    def __init__(self, folder, lineage, name):
        self.folder, self.lineage, self.name = folder, lineage, name
        self.job = f"{lineage}/{name}"
        self.key, self.recovery = isolate.SigningKey.generate(), isolate.Identity.generate()
        ends = ("service", "platform", "enclave")
        self.service, self.platform, self.enclave = (f"unix:{folder}/{end}" for end in ends)
        self.owner = Owner(self.key, service=self.service, lineage=lineage)
        self.enclaves = []
        self._processes = contextlib.ExitStack()

    def __enter__(self):
        self.key.save(self.folder / "owner.key")
        serve = ["isolate", "serve", "--state", f"{self.folder}/state", "--listen", self.service]
        serve += ["--init", f"{self.folder}/owner.key", "--lineage", self.lineage]
        serve += ["--passphrase-file", f"{self.folder}/passphrase", "--recovery", str(self.recovery.recipient)]
        platform = [
            "isolate.launch.platform",
            "--state",
            f"{self.folder}/platform-state",
            "--listen",
            self.platform,
        ]
        with self._processes:
            self._start("service", "serving on", serve)
            self._start("platform", "ready", platform)
            self._processes = self._processes.pop_all()
        return self

    def __exit__(self, *_):
        self._processes.close()

    def _start(self, name, ready, command):
        """A background process, once it has printed ``ready``. What it says on standard error is kept."""
        errors = self._processes.enter_context((self.folder / f"{name}.err").open("w"))
        process = subprocess.Popen(
            [sys.executable, "-m", *command], stdout=subprocess.PIPE, stderr=errors, text=True
        )
        self._processes.enter_context(process)
        self._processes.callback(process.terminate)
        while ready not in (line := process.stdout.readline()):
            if not line:
                raise SystemExit(f"the {name} did not start: see {name}.err")

    def application(self, source, *more, parameters=""):
        """The owner's application: a folder of code, and the configuration that is measured with it."""
        app = self.folder / "app"
        shutil.copytree(source, app, ignore=shutil.ignore_patterns("__pycache__"))
        for file, name in more:
            shutil.copyfile(file, app / name)
        (app / "isolate.toml").write_text(
            f'[owner]\nroot = "{self.key.verifying_key}"\nlineage = "{self.lineage}"\n[enclave]\n'
            f'purpose = "{self.name}"\njob = "{self.job}"\nINSECURE_accept_simulated = true\n{parameters}'
        )
        return app

    def admit(self, app, *assets, writers=()):
        """The owner's policy names the measurement, computed offline, and a simulated platform: INSECURE."""
        self.host = Host(self.platform, logs=self.folder)
        policy = Policy(
            lineage=self.lineage,
            sequence=1,
            references=(Reference(self.name, "simulated", measure(app).registers),),
            simulated_anchors=(x509.fingerprint(self.host.root_certificate()),),
            INSECURE_accept_simulated=True,
        )
        self.owner.set_policy(policy)
        for asset in assets:
            self.owner.set_rule(asset, readers=[self.name], writers=list(writers))

    def seal(self, asset, tensors, *, seal=isolate.sealed.save_file):
        """Sealed to the service, and to an offline key of the owner's; the operator keeps the file."""
        path = self.folder / (asset.replace("/", "-") + ".sealed")
        recipients = [self.owner.certificate.sealing_recipient(), self.recovery.recipient]
        seal(tensors, path, recipients=recipients, sign=self.key, model_id=asset)
        self.owner.register(path)
        return path

    def launch(self, app, timeout=60):
        """The operator launches an enclave, in the last one's place: it is measured, and gets the keys."""
        if self.enclaves:
            self.enclaves[-1].kill()
            self.enclaves[-1].wait(10)
        where = {"ISOLATE_SERVICE": self.service, "ISOLATE_LISTEN": self.enclave}
        where["ISOLATE_ASSETS"] = str(self.folder)
        self.enclaves.append(self.host.launch(f"{self.name}-{len(self.enclaves)}", app, where))
        event = self.enclaves[-1].event("serving", "failed", timeout=timeout)
        if event["event"] != "serving":
            raise SystemExit(f"the enclave did not start: {event}")
        return event

    def handle(self, asset, operations, **limits):
        """A handle on the asset for somebody new, attached: one token, held by one key."""
        holder = isolate.SigningKey.generate()
        file = self.owner.grant(
            asset,
            operations={operation.name: operation.digest for operation in operations},
            holder=holder.verifying_key.ed25519,
            enclave=self.enclave,
            job=self.job,
            INSECURE_accept_simulated=True,
            **limits,
        )
        return isolate.attach(file, signer=holder)
