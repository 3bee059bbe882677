"""The steps of the demo, in order. Each expectation is one boolean, and says what a control is worth."""

from __future__ import annotations

import gzip
import importlib.util
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from attrs import evolve

from isolate import sealed
from isolate.attestation.appraisal import appraise
from isolate.attestation.evidence import Envelope
from isolate.attestation.policy import Policy, Reference
from isolate.cli.demo import attacks
from isolate.cli.demo.search import canary, encoded, find, needles_of, search
from isolate.cli.demo.world import World, isolate_command
from isolate.client.approve import Exporter, Wish, approve_export, read_approval
from isolate.client.audit import Auditor
from isolate.client.handle import Handle, attach
from isolate.client.owner import Owner
from isolate.crypto import x509
from isolate.crypto.kem import Identity
from isolate.crypto.signing import SigningKey
from isolate.errors import IsolateError
from isolate.launch.measure import runtime_files
from isolate.launch.supervisor import Enclave
from isolate.messages.http import fetch
from isolate.transparency import Checkpoint, ConsistencyProof, InclusionProof

LINEAGE = "digits"
HELD_OUT = 297
FLIPPED_BYTE = 60_000  # of the second gradients channel: past its handshake, inside a record


def load_digits() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Pixels (1797, 64) uint8 and digits (1797,) int64, in a fixed shuffled order."""
    packaged = resources.files("isolate.cli").joinpath("data", "digits.csv.gz")
    inside = Path(str(packaged))
    path = inside if inside.is_file() else Path(__file__).parents[4] / "examples" / "data" / "digits.csv.gz"
    rows = np.loadtxt(gzip.decompress(path.read_bytes()).decode().splitlines(), delimiter=",", dtype=np.int64)
    rows = rows[np.random.default_rng(7).permutation(len(rows))]
    return rows[:, :64].astype(np.uint8), rows[:, 64]


def load_module(path: Path) -> Any:
    """The owner's own code, loaded on the owner's side."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise RuntimeError(path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Story:
    """``say`` prints a line, or is None. After ``tell``, ``expectations`` maps each name to whether it held."""

    NOT_STOPPED: ClassVar[tuple[str, ...]] = (
        "root on the host: it reads an enclave's memory, and holds the simulated platform's root key",
        "the platform's own process: simulated evidence is only as good as who runs it",
        "how large the sealed files are, who talks to whom, when, and how much",
        "what a permitted operation answers: a handle's budget bounds it, and nothing undoes it",
        "the operator switching the machine off",
    )

    def __init__(self, world: World, *, say: Callable[[str], Any] | None) -> None:
        self.world = world
        self._say = say or (lambda _: None)
        self.expectations: dict[str, bool] = {}
        self.details: dict[str, str] = {}
        self.steps: list[dict[str, Any]] = []
        self.canary = b"canary-" + secrets.token_hex(16).encode()
        self.owner = Owner(world.key, service=world.address("service"), lineage=LINEAGE)

    def tell(self) -> None:
        for number, step in enumerate((
            self.start, self.seal, self.attest, self.train, self.reopen, self.use, self.export, self.audit,
            self.look,
        ), 1):  # fmt: skip
            began = time.monotonic()
            self._say(f"\n{number}. {(step.__doc__ or '').strip()}")
            step()
            seconds = time.monotonic() - began
            self.steps.append({"step": number, "name": step.__name__, "seconds": round(seconds, 2)})
            self._say(f"   ({seconds:.1f} s)")

    def expect(self, name: str, held: bool, detail: str) -> None:
        """Note an expectation. ``detail`` is what happened, in one line."""
        self.expectations[name] = bool(held)
        self.details[name] = detail
        self._say(f"   {'ok ' if held else 'NOT'} {detail}")

    def refused(self, name: str, code: str, attempt: Callable[[], Any], what: str) -> None:
        """Expect that ``attempt`` ends with this code."""
        try:
            attempt()
        except IsolateError as error:
            self.expect(name, error.code == code, f"{what}: refused, {error.code}")
        else:
            self.expect(name, False, f"{what}: was allowed")

    # 1
    def start(self) -> None:
        """The owner starts the attestation service, with a policy that names the enclaves' measurements."""
        world = self.world
        world.start_courier()
        world.start_platform()
        world.start_service(LINEAGE)
        self.trainer = world.application("trainer", LINEAGE, "\n[parameters]\nseed = 11\n")
        self.classifier = world.application("classifier", LINEAGE)
        self.measured = {path.name: self.measure(path) for path in (self.trainer, self.classifier)}
        certificate = world.host.root_certificate()
        self.policy = Policy(
            lineage=LINEAGE,
            sequence=2,
            references=tuple(Reference(name, "simulated", found) for name, found in self.measured.items()),
            simulated_anchors=(x509.fingerprint(certificate),),
            INSECURE_accept_simulated=True,
        )
        self.owner.set_policy(self.policy)
        self._say(f"   policy {self.policy.id.hex()[:16]} is in force, and accepts simulated evidence: INSECURE")
        self.refused(
            "old_policy_refused",
            "policy_rollback",
            lambda: self.owner.set_policy(self.policy.evolve(sequence=1)),
            "the owner's own policy of a lower sequence, offered again",
        )
        self.early = self.checkpoint()

    def measure(self, application: Path) -> dict[str, bytes]:
        """As anyone does it: `isolate measure`, offline."""
        done = subprocess.run(
            isolate_command("measure", str(application)), capture_output=True, text=True, check=True
        )
        words = [line.split() for line in done.stdout.splitlines()]
        return {name: bytes.fromhex(value) for name, value in words}

    def checkpoint(self) -> Checkpoint:
        certificate = self.owner.certificate
        answer = self.owner.log()
        return Checkpoint.verify(answer.checkpoint, certificate.origin, certificate.log_key.ed25519)

    # 2
    def seal(self) -> None:
        """The owner seals data and first weights to the service, and to an offline recovery recipient."""
        pixels, digits = load_digits()
        network = load_module(self.trainer / "network.py")
        self.network = network
        self.train_pixels, self.train_digits = pixels[HELD_OUT:], digits[HELD_OUT:]
        self.test_pixels, self.test_digits = pixels[:HELD_OUT], digits[:HELD_OUT]
        self.first = network.initial(seed=3)
        planted = np.frombuffer(self.canary, np.uint8)
        train = {"pixels": self.train_pixels, "digits": self.train_digits, "note": planted}
        self.seal_asset("digits/train", train)
        weights = self.seal_asset("digits/weights", self.first)
        self.owner.set_rule("digits/train", readers=["trainer"])
        self.owner.set_rule("digits/weights", readers=["trainer"])
        self.owner.set_rule("digits/model", readers=["classifier"], writers=["trainer"])
        opened = sealed.load_file(weights, identity=self.world.recovery, signed_by=self.world.key.verifying_key)
        same = all(np.array_equal(opened[name], value) for name, value in self.first.items())
        self.expect("recovery_opens", same, f"{weights.name} opens with the offline recovery key, and is the same")

        def open_it(path: Path) -> Callable[[], Any]:
            key = self.world.key.verifying_key
            return lambda: sealed.load_file(path, identity=self.world.recovery, signed_by=key)

        attacks.flip_a_bit(weights, flipped := self.world.operator / "flipped.sealed")
        self.refused(
            "flipped_file_refused", "tampered", open_it(flipped), "the operator flips one bit of the weights"
        )
        recipients = [self.owner.certificate.sealing_recipient(), self.world.recovery.recipient]
        stranger = attacks.seal_as_a_stranger(self.first, recipients, self.world.operator / "stranger.sealed")
        self.refused(
            "stranger_file_refused",
            "unauthenticated_origin",
            open_it(stranger),
            "the operator seals other weights to the same recipients",
        )

    def seal_asset(self, asset: str, tensors: dict[str, Any]) -> Path:
        path = self.world.owner / f"{asset.replace('/', '-')}.sealed"
        sealed.save_file(
            tensors,
            path,
            recipients=[self.owner.certificate.sealing_recipient(), self.world.recovery.recipient],
            sign=self.world.key,
            model_id=asset,
        )
        self.owner.register(path)
        return self.world.hand_over(path)

    # 3
    def attest(self) -> None:
        """The operator's platform measures and launches enclaves; only the named ones get keys."""
        world = self.world
        listen = {"ISOLATE_LISTEN": world.behind("gradients"), "ISOLATE_PEER": world.address("gradients")}
        # The second connection of the gradients route is the one that the operator tampers with, in step 4.
        world.tell_courier(f"flip gradients 1 {FLIPPED_BYTE}")
        self.trainers = [world.launch(f"trainer-{rank}", self.trainer, rank, **listen) for rank in (0, 1)]
        events = [enclave.event("attested", "failed") for enclave in self.trainers]
        same = all(dict(one.registers) == self.measured["trainer"] for one in self.trainers)
        admitted = [event["event"] == "attested" for event in events]
        self.expect(
            "enclaves_attested", all(admitted), "two training enclaves attested, and were given keys by HPKE"
        )
        self.expect("measured_offline", same, "the platform measured what `isolate measure` printed offline")

        thief = attacks.change_one_line(self.trainer, world.operator / "apps" / "modified")
        event = world.launch("modified", thief, 5).event("admitted", "failed")
        reason = str(event.get("message", "was admitted"))
        named = event.get("code") == "appraisal_measurement" and "PCR2" in reason
        self.expect("modified_enclave_refused", named, f"a third, with one line changed: {reason}")

        instance = bytes.fromhex(events[0].get("instance", "00" * 32))
        envelope = Envelope.parse(self.owner.evidence(instance))
        self.refused(
            "self_claimed_measurement_refused",
            "appraisal_authentic",
            lambda: attacks.claim_a_measurement(world.address("service"), self.measured["trainer"]),
            "a process that claims the good measurement by itself",
        )
        self.refused(
            "replayed_evidence_refused",
            "nonce_refused",
            lambda: attacks.replay(world.address("service"), world.record),
            "the recorded evidence, sent again",
        )
        runtime, production = envelope.runtime, evolve(self.policy, INSECURE_accept_simulated=False)
        record = appraise(envelope, policy=production, nonce=runtime.nonce, slot=runtime.slot, at=int(time.time()))
        why = [check.name for check in record.checks if not check.passed]
        self.expect(
            "simulated_refused_in_production",
            why == ["simulated"],
            f"the same evidence under a production policy fails one check: {', '.join(why) or 'none'}",
        )

    # 4
    def train(self) -> None:
        """Both train data-parallel over an attested channel, through the operator's relay."""
        events = [enclave.event("trained", "failed", timeout=60) for enclave in self.trainers]
        newest = self.owner.newest("digits/model")
        model = sealed.load_file(
            self.world.assets / "digits-model.sealed", identity=self.world.recovery, expect=newest.digest
        )
        self.model = model
        guesses = self.network.predict(model, self.test_pixels)
        accuracy = float((guesses == self.test_digits).mean())
        finished = all(event["event"] == "trained" for event in events)
        self.expect("trained_to_accuracy", finished and accuracy > 0.93, f"held-out accuracy {accuracy:.4f}")
        twin = self.train_in_plaintext()
        self.expect(
            "same_as_plaintext",
            np.array_equal(self.network.predict(twin, self.test_pixels), guesses),
            f"one plaintext process, same order of data: the same {len(guesses)} predictions",
        )
        ends = [enclave.event("channel_ended", "failed") for enclave in self.trainers]
        codes = [str(event.get("code")) for event in ends]
        typed = codes[0] == "record_refused" and codes[1].startswith("channel_")
        taken = sum(event.get("taken_wrong", 1) for event in ends)
        self.expect(
            "flipped_record_refused",
            typed and taken == 0,
            f"the relay flips one bit: {codes[0]} on one side, {codes[1]} on the other, {taken} wrong bytes taken",
        )

    def train_in_plaintext(self) -> dict[str, Any]:
        """The same training on one process of the owner's, in the clear."""
        data, out = self.world.owner / "plain.npz", self.world.owner / "twin.npz"
        np.savez(data, pixels=self.train_pixels, digits=self.train_digits, **self.first)
        code = (
            "import sys, numpy as np; sys.path.insert(0, sys.argv[1]); import network\n"
            "data = dict(np.load(sys.argv[2])); pixels, digits = data.pop('pixels'), data.pop('digits')\n"
            "np.savez(sys.argv[3], **network.on_one_process(data, pixels, digits, seed=11))"
        )
        subprocess.run([sys.executable, "-c", code, str(self.trainer), str(data), str(out)], check=True)
        return dict(np.load(out))

    # 5
    def reopen(self) -> None:
        """The model was sealed inside; an inference enclave, attested anew, opens it."""
        listen = {"ISOLATE_LISTEN": self.world.behind("invoke")}
        self.server: Enclave = self.world.launch("classifier", self.classifier, 0, **listen)
        event = self.server.event("serving", "failed")
        serving = event["event"] == "serving"
        self.expect(
            "model_reopened", serving, f"the inference enclave {'serves' if serving else event.get('code')}"
        )

    # 6
    def use(self) -> None:
        """A handle goes to a team, narrowed offline to one analyst: use without seeing."""
        world = self.world
        digests = {one.name: one.digest for one in load_module(self.classifier / "operations.py").OPERATIONS}
        team_key, analyst_key, second_key = (SigningKey.generate() for _ in range(3))
        file = self.owner.grant(
            "digits/model",
            operations=digests,
            holder=team_key.verifying_key.ed25519,
            enclave=world.address("invoke"),
            job=f"{LINEAGE}/classifier",
            INSECURE_accept_simulated=True,
        )
        (world.users / "team.handle").write_text(file.to_text(), encoding="utf-8")
        images, truth = self.test_pixels[:10], self.network.predict(self.model, self.test_pixels[:10])
        with attach(world.users / "team.handle", signer=team_key) as team:
            narrowed = team.attenuate(operations=["classify"], uses=10, holder=analyst_key.verifying_key.ed25519)
            second = team.attenuate(operations=["classify"], uses=5, holder=second_key.verifying_key.ed25519)
            with attach(narrowed, signer=analyst_key) as analyst, attach(second, signer=second_key) as other:
                answers = self.classify(analyst, images)
                self.expect(
                    "analyst_classifies",
                    answers == truth.tolist(),
                    f"the analyst classifies ten images: {answers}",
                )
                self.receipt = analyst.receipt()
                self.refused(
                    "eleventh_use_refused",
                    "budget_exhausted",
                    lambda: analyst.invoke("classify", image=images[0]),
                    "an eleventh use",
                )
                self.refused(
                    "out_of_scope_refused",
                    "scope_exceeded",
                    lambda: attacks.invoke_anyway(other, "confidence", digests["confidence"], image=images[0]),
                    "an operation outside the scope, by a client that was changed to send it anyway",
                )
                self.refused(
                    "weights_refused", "output_refused", lambda: team.invoke("weights"), "the weights themselves"
                )
                self.refused(
                    "stolen_token_refused",
                    "holder_refused",
                    lambda: attacks.use_a_stolen_token(file, digests["classify"], image=images[0]),
                    "the token without its holder key",
                )
                other.invoke("classify", image=images[0])
                self.owner.revoke(team.id)
                self.refused(
                    "revoked_use_refused",
                    "revoked",
                    lambda: other.invoke("classify", image=images[0]),
                    "a use after the handle it came from was revoked",
                )

    @staticmethod
    def classify(handle: Handle, images: Any) -> list[Any]:
        """Ten uses; a refusal in between shows as its code."""
        answers: list[Any] = []
        for image in images:
            try:
                answers.append(handle.invoke("classify", image=image))
            except IsolateError as error:
                answers.append(error.code)
        return answers

    # 7
    def export(self) -> None:
        """Plaintext leaves the service only when two of three people approve."""
        people, archive = [SigningKey.generate() for _ in range(3)], Identity.generate()
        self.owner.set_approvers([one.verifying_key for one in people], 2)
        newest, audience = self.owner.newest("digits/model"), self.owner.certificate.audience
        wish = Wish(audience, "digits/model", newest.digest, archive.recipient.raw, "yearly archive")

        def export(approvers: list[SigningKey]) -> dict[str, Any]:
            given = [read_approval(approve_export(wish, one)) for one in approvers]
            exporter = Exporter(
                given, archive, service=self.world.address("service"), owner=self.world.key.verifying_key,
                lineage=LINEAGE,
            )  # fmt: skip
            return sealed.load_file(self.world.assets / "digits-model.sealed", identity=exporter)

        self.refused(
            "lone_administrator_refused",
            "approvals_missing",
            lambda: export(people[:1]),
            "one administrator alone asks for the model in plaintext",
        )
        model = export(people[:2])
        same = all(np.array_equal(model[name], value) for name, value in self.model.items())
        self.expect("two_export", same, "two of them export it, to a destination that both named; it is in the log")

    # 8
    def audit(self) -> None:
        """The log of releases and uses is verified from outside."""
        certificate = self.owner.certificate
        origin, key = certificate.origin, certificate.log_key.ed25519
        newest = self.owner.newest("digits/model")
        answer = self.owner.log(old_size=self.early.size, index=newest.log_index)
        late = Checkpoint.verify(answer.checkpoint, origin, key)
        inclusion = InclusionProof(newest.log_index, late.size, tuple(answer.inclusion))
        entry = answer.entry or b""
        self.expect(
            "log_inclusion",
            not _raises(lambda: inclusion.verify(entry, late))
            and _raises(lambda: inclusion.verify(entry + b"!", late)),
            f"the model's registration is entry {newest.log_index} of {late.size}; a changed entry is not",
        )
        consistency = ConsistencyProof(self.early.size, late.size, tuple(answer.consistency))
        forked = attacks.fork(self.early)
        self.expect(
            "log_consistency",
            not _raises(lambda: consistency.verify(self.early, late))
            and _raises(lambda: consistency.verify(forked, late)),
            f"the log of {late.size} entries continues the one of {self.early.size}; a forked one does not",
        )
        service, use = self.world.address("service"), self.receipt
        auditor = Auditor(lambda path, most: fetch(service, f"/log/{path}", most=most), origin=origin, public=key)
        other = evolve(use, salt=bytes(32))
        self.expect(
            "log_receipt",
            not _raises(lambda: auditor.find(use, certificate.release_key, late))
            and _raises(lambda: auditor.find(other, certificate.release_key, late)),
            f"the analyst's receipt is for entry {use.settled.log_index}; one with another opening is not",
        )
        codes = self.refused_inside()
        self.expect(
            "log_refusals", bool(codes), f"the owner reads there what the enclave refused: {', '.join(codes)}"
        )

    def refused_inside(self) -> list[str]:
        """The codes of what the log says that an enclave refused by itself, of which it tells soon after."""
        for _ in range(150):
            if codes := [one.details["code"] for one in self.owner.entries() if one.kind == "invocation refused"]:
                break
            time.sleep(0.1)
        return codes

    # 9
    def look(self) -> None:
        """What the operator saw."""
        needles = canary(self.canary)
        arrays = {
            "first weights": self.first["w1"],
            "trained weights": self.model["w1"],
            "images": self.train_pixels,
        }
        arrays["query images"] = self.test_pixels[:10]
        for name, array in arrays.items():
            needles += needles_of(name, array)
        counted, pids = self.world.connections()
        carried = sum(counted["connections"].values())
        past = sum(pid != counted["pid"] for pid in pids)
        self.expect(
            "all_traffic_recorded",
            past == 0 and len(pids) == carried,
            f"{carried} connections, all through the recorder, {past} past it",
        )
        files = self.world.traces()
        total, hits = search(needles, files, runtime_files())
        found = sorted({f"{needle.secret} as {needle.form} in {path.name}" for path, needle in hits})
        self.expect(
            "operator_saw_nothing",
            not found,
            f"{len(needles)} traces looked for in {len(files)} files, {total / 1e6:.0f} MB: "
            + ("; ".join(found[:4]) or "none found"),
        )
        missed = [
            f"{name} as {form}"
            for name, array in arrays.items()
            for form, text in encoded(array).items()
            if form not in {needle.form for needle in find([n for n in needles if n.secret == name], text)}
        ]
        if not find(canary(self.canary), b"..." + self.canary):
            missed.append("canary")
        self.expect(
            "search_can_find",
            not missed,
            f"the same search over a plaintext copy finds them all in each form{': not ' if missed else ''}"
            + ", ".join(missed),
        )
        self._say("\n   What this does not stop:")
        for line in self.NOT_STOPPED:
            self._say(f"   -   {line}")


def _raises(attempt: Callable[[], Any]) -> bool:
    try:
        attempt()
    except IsolateError:
        return True
    return False
