"""A stock gRPC server and client under certificates of attested enclaves: nothing of gRPC is changed or wrapped.

Run it: python examples/grpc_cluster.py      (needs the extra "grpc": grpcio)
Mode: workload. Rank 0 serves, rank 1 calls it, both renew their certificates while they do. Refused: who has no
certificate, who made one, and an attested enclave of another owner. The platform is simulated.

What TLS does not bind stands in isolate.enclave.certificates; where you can, use isolate.channel.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import isolate
from isolate.enclave import certificates

LIFETIME = 6  # seconds of a certificate: an hour is usual, and too long to watch
JOB = "cluster"
METHOD = "/isolate.example.Cluster/Hello"

# Inside the enclaves: the owner's application, with gRPC beside it, all of it measured ------------------------


def serve(workload, keeper):
    import grpc

    def configuration():
        now = keeper.current
        return grpc.ssl_server_certificate_configuration([(now.key, now.certificate)], now.roots)

    def hello(request, context):
        shown = context.auth_context()["x509_pem_cert"][0]
        peer = certificates.verify_peer(workload, keeper.current, shown)  # who of the job it is
        return f"{request.decode()}, rank {peer.rank}: certificate {keeper.number} here".encode()

    server = grpc.server(ThreadPoolExecutor(4))
    handlers = {"Hello": grpc.unary_unary_rpc_method_handler(hello)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("isolate.example.Cluster", handlers)])
    # gRPC asks for the configuration at each handshake: that is all that rotation takes.
    credentials = grpc.dynamic_ssl_server_credentials(configuration(), configuration, True)
    server.add_secure_port(os.environ["ISOLATE_ENGINE"], credentials)
    server.start()
    workload.report("serving", spiffe=keeper.current.spiffe)
    server.wait_for_termination()


def call(workload, keeper):
    answers = []
    while not (answers and "certificate 3" in answers[-1] and keeper.number >= 3):
        now = keeper.current
        credentials = (now.roots, now.key, now.certificate)
        # The name says job and rank: another rank that listens there is refused.
        answers.append(hello(os.environ["ISOLATE_ENGINE"], now.name.replace("rank-1.", "rank-0."), *credentials))
        workload.report("answered", answer=answers[-1], own=keeper.number)
        time.sleep(0.3)
    workload.report("done", calls=len(answers), refused=sum("refused" in one for one in answers))


def intrude(workload, keeper):
    """An enclave of another owner: attested, certified in its own trust domain, and told the right roots."""
    now, roots = keeper.current, Path(os.environ["ISOLATE_ROOTS"]).read_bytes()
    name = os.environ["ISOLATE_ENGINE_NAME"]
    answer = hello(os.environ["ISOLATE_ENGINE"], name, roots, now.key, now.certificate)
    workload.report("intruded", spiffe=now.spiffe, answer=answer)


def inside():
    with isolate.join() as workload, certificates.keep(workload, lifetime=LIFETIME) as keeper:
        act = {"serve": serve, "call": call, "intrude": intrude}[os.environ["ISOLATE_ACT"]]
        act(workload, keeper)


# Anywhere: a plain gRPC client --------------------------------------------------------------------------------


def hello(address, name, roots, key=None, certificate=None):
    import grpc

    credentials = grpc.ssl_channel_credentials(roots, key, certificate)
    options = [("grpc.ssl_target_name_override", name), ("grpc.enable_retries", 0)]
    with grpc.secure_channel(address, credentials, options) as channel:
        try:
            return channel.unary_unary(METHOD)(b"hello", timeout=5).decode()
        except grpc.RpcError as error:
            return f"refused: {error.code().name}"


# Outside: owners and operator ---------------------------------------------------------------------------------


@contextlib.contextmanager
def running(ready, *command):
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


def application(folder, key, name):
    """The measured folder: this file, the configuration, and gRPC as it comes from its wheel."""
    import grpc
    import typing_extensions

    app = folder / "app"
    app.mkdir()
    shutil.copyfile(__file__, app / "main.py")
    shutil.copytree(Path(grpc.__file__).parent, app / "grpc", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(typing_extensions.__file__, app / "typing_extensions.py")
    (app / "isolate.toml").write_text(
        f'[owner]\nroot = "{key.verifying_key}"\nlineage = "{name}"\n'
        f'[enclave]\npurpose = "{JOB}"\njob = "{name}/{JOB}"\nINSECURE_accept_simulated = true\n'
    )
    return app


@contextlib.contextmanager
def owner_of(folder, name, host):
    """An owner with a service of its own, a policy for its application; and how its enclaves are launched."""
    from isolate.attestation.policy import Policy, Reference
    from isolate.client.owner import Owner
    from isolate.crypto import x509
    from isolate.launch.measure import measure

    folder.mkdir()
    key, service = isolate.SigningKey.generate(), f"unix:{folder}/service"
    key.save(folder / "owner.key")
    app = application(folder, key, name)
    words = ["--state", f"{folder}/state", "--listen", service, "--init", f"{folder}/owner.key", "--name", name]
    words += ["--passphrase-file", f"{folder}/passphrase-{name}"]
    with running("serving on", "isolate", "serve", *words, "--lineage", name):
        owner = Owner(key, service=service, lineage=name)
        reference = Reference(JOB, "simulated", measure(app).registers)
        anchor = x509.fingerprint(host.root_certificate())
        policy = {"references": (reference,), "simulated_anchors": (anchor,), "INSECURE_accept_simulated": True}
        owner.set_policy(Policy(lineage=name, sequence=1, **policy))

        def launch(rank, act, **where):
            environment = {"ISOLATE_SERVICE": service, "ISOLATE_RANK": str(rank), "ISOLATE_ACT": act, **where}
            return host.launch(f"{name}-{rank}", app, environment)

        yield owner, service, launch


def outside(folder):
    from isolate.crypto import spiffe
    from isolate.crypto.tls import self_signed
    from isolate.launch.supervisor import Host
    from isolate.messages.certificate import BundleRequest, TrustBundle, trust_domain
    from isolate.messages.http import post

    with socket.create_server(("127.0.0.1", 0)) as free:
        engine = f"127.0.0.1:{free.getsockname()[1]}"
    platform = f"unix:{folder}/platform"
    words = ["--state", f"{folder}/platform-state", "--listen", platform]
    with contextlib.ExitStack() as undo:
        undo.enter_context(running("ready", "isolate.launch.platform", *words))
        host = Host(platform, logs=folder)
        owner, service, launch = undo.enter_context(owner_of(folder / "acme", "acme", host))
        _, _, launch_rival = undo.enter_context(owner_of(folder / "rival", "rival", host))
        print(launch(0, "serve", ISOLATE_ENGINE=engine).event("serving", "failed", timeout=60))
        client = launch(1, "call", ISOLATE_ENGINE=engine)

        # Whom to trust as a workload of this job: anyone may ask, and the service signs it.
        job, name = f"acme/{JOB}", trust_domain("acme", "simulated")
        found = post(service, "bundle", BundleRequest(job, "simulated"), TrustBundle)
        trust = found.verify(owner.certificate, job=job, now=int(time.time()), INSECURE_accept_simulated=True)
        (folder / "roots.pem").write_bytes(trust.pem())
        server = spiffe.dns_name(name, job, 0)
        print("without a certificate:", hello(engine, server, trust.pem()))
        now = int(time.time())
        key, made = self_signed(server, not_before=now - 60, not_after=now + 600)
        print("with one of its own making:", hello(engine, server, trust.pem(), key, made))
        where = {"ISOLATE_ROOTS": f"{folder}/roots.pem", "ISOLATE_ENGINE_NAME": server, "ISOLATE_ENGINE": engine}
        print(
            "of another trust domain:", launch_rival(0, "intrude", **where).event("intruded", "failed", timeout=60)
        )

        done = client.event("done", "failed", timeout=60)
        for event in client.events():
            if event["event"] == "answered":
                print(f"own certificate {event['own']}: {event['answer']}")
        print(done)


if __name__ == "__main__":
    if "ISOLATE_APPLICATION" in os.environ:
        inside()
    else:
        try:
            import grpc  # noqa: F401
        except ImportError:
            raise SystemExit("this example needs grpcio: pip install 'isolate-confidential[grpc]'") from None
        with tempfile.TemporaryDirectory() as folder:
            outside(Path(folder))
