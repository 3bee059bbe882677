"""What an application asks for beside the plain runtime: measured when asked for, and absent otherwise."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import isolate
from isolate.crypto import cbor
from isolate.errors import StorageError, UsageError
from isolate.launch import measure as measuring
from isolate.launch import platform as platforms
from isolate.launch.measure import Digests, _is_loaded, measure, needs, runtime_files, tree

# What stands in docs/spec/evidence.md, 11.2, written down a second time.
ROOMS = ("crypto", "sealed", "attestation", "capability", "transparency", "channel", "messages", "enclave")
DISTRIBUTIONS = ("attrs", "blake3", "cbor2", "cffi", "cryptography", "numpy", "PyJWT", "PyNaCl")
LOOK = """
import sys
from isolate.enclave.boot import event
try:
    import sortedcontainers
    event("looked", found=sortedcontainers.__file__)
except ImportError:
    event("looked", found=None)
"""


def asking(folder: Path, *names: str) -> Path:
    text = (folder / "isolate.toml").read_text()
    listed = ", ".join(f'"{name}"' for name in names)
    (folder / "isolate.toml").write_text(text.replace("[enclave]", f"[enclave]\nneeds = [{listed}]"))
    return folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In place of torch and its 580 MB, a small distribution that no plain runtime has."""
    monkeypatch.setattr(measuring, "_EXTRAS", {"torch": ((), ("sortedcontainers",))})
    monkeypatch.setattr(platforms, "_WARM_EXTRAS", {})
    runtime_files.cache_clear()
    yield
    runtime_files.cache_clear()


def plain_pcr1() -> bytes:
    package = Path(isolate.__file__).parent
    files = {f"isolate/{name}": package / name for name in ("__init__.py", "errors.py")}
    for room in ROOMS:
        files |= {f"isolate/{path.relative_to(package).as_posix()}": path for path in (package / room).rglob("*")}
    for name in DISTRIBUTIONS:
        for entry in metadata.distribution(name).files or []:
            if not {"..", "tests"} & set(entry.parts) and ".dist-info" not in entry.parts[0]:
                files[entry.as_posix()] = Path(str(entry.locate()))
    rows = [
        [path, hashlib.sha384(file.read_bytes()).digest()]
        for path, file in sorted(files.items())
        if file.is_file() and "__pycache__" not in path
    ]
    runtime = hashlib.sha384(cbor.encode(rows)).digest()
    return hashlib.sha384(cbor.encode(["isolate/runtime/v1", measuring._platform_digest(), runtime])).digest()


@pytest.mark.threat("LAUNCH-1")
def test_who_asks_for_nothing_is_measured_as_ever(application: Callable[..., Path]) -> None:
    folder = application("pass")
    found = measure(folder).registers["PCR1"]
    assert found == plain_pcr1()
    assert found == measure(asking(folder)).registers["PCR1"]
    assert not [name for name in runtime_files() if name.startswith(("torch", "isolate/torch", "sympy"))]


@pytest.mark.threat("LAUNCH-1")
def test_an_extra_is_measured_and_there_only_for_who_asked(
    host: Any, application: Callable[..., Path], small: None
) -> None:
    plain, extra = application(LOOK), asking(application(LOOK), "torch")
    for folder, runtime in ((extra, "runtime-torch"), (plain, "runtime")):
        child = host.launch(folder)
        (event,) = host.events("looked", "failed")
        assert (event["found"] is not None) == (folder is extra)
        if event["found"]:
            assert Path(event["found"]).is_relative_to(child.image.runtime.resolve())
        assert child.image.runtime.name == runtime
        assert dict(child.image.measurement.registers) == dict(measure(folder).registers)
    assert measure(plain).registers["PCR1"] != measure(extra).registers["PCR1"]


@pytest.mark.threat("LAUNCH-2")
def test_a_snapshot_that_was_changed_is_measured_anew(
    host: Any, application: Callable[..., Path], small: None
) -> None:
    folder = asking(application(LOOK), "torch")
    before = host.platform.image(folder)
    victim = next((before.runtime / "sortedcontainers").glob("*.py"))
    status, text = victim.stat(), victim.read_bytes()
    victim.chmod(0o644)
    victim.write_bytes(text.replace(b"e", b"a", 1))  # of the same length
    os.utime(victim, ns=(status.st_atime_ns, status.st_mtime_ns))
    try:
        after = host.platform.image(folder)
    finally:
        victim.write_bytes(text)
    assert after.measurement.registers["PCR1"] != before.measurement.registers["PCR1"]
    assert host.platform.image(folder).measurement.registers == before.measurement.registers


@pytest.mark.threat("LAUNCH-2")
def test_what_an_earlier_platform_left_is_not_in_the_snapshot(
    application: Callable[..., Path], tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / "state" / "runtime-torch" / "sortedcontainers" / "unmeasured.py"
    left.parent.mkdir(parents=True)
    left.write_text("raise SystemExit('unmeasured')")
    platform = platforms.Platform(platforms.SimulatedRoot.generate(), tmp_path / "state")
    monkeypatch.setattr(platform, "_python", lambda *_, **__: None)  # compiling takes long, and is of no use here
    platform.image(asking(application("pass"), "torch"))
    assert not left.exists()


def test_a_digest_is_kept_while_the_file_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, read = tmp_path / "file", list[Path]()
    file.write_bytes(b"one")
    digest = measuring._digest
    monkeypatch.setattr(measuring, "_digest", lambda path: read.append(path) or digest(path))
    known = Digests()
    assert known(file) == known(file) == hashlib.sha384(b"one").digest()
    assert len(read) == 1
    (tmp_path / "other").write_bytes(b"two")
    (tmp_path / "other").replace(file)  # another inode
    assert known(file) == hashlib.sha384(b"two").digest()
    file.unlink()
    with pytest.raises(StorageError):
        known(file)


@pytest.mark.threat("LAUNCH-1")
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('needs = ["pandas"]', "no runtime has: pandas"),
        ('needs = ["../torch"]', "no runtime has"),
        ('needs = "torch"', "list of names"),
        ("needs = [1]", "list of names"),
        ("needs = [", "no TOML"),
        ("x = " + "[" * 5000, "no TOML"),
    ],
)
def test_what_is_not_known_is_refused_before_anything_starts(
    host: Any, application: Callable[..., Path], line: str, said: str
) -> None:
    folder = application("pass")
    text = (folder / "isolate.toml").read_text()
    (folder / "isolate.toml").write_text(text.replace("[enclave]", f"[enclave]\n{line}"))
    for attempt in (measure, host.launch):
        with pytest.raises(UsageError, match=said):
            attempt(folder)


def test_a_configuration_that_is_none(application: Callable[..., Path]) -> None:
    folder = application("pass")
    file = folder / "isolate.toml"
    for content, said in (
        (b"\xff", "no TOML"),
        (b'enclave = "x"', "list of names"),
        (b"#" * (measuring.MAX_CONFIGURATION_BYTES + 1), "too large"),
    ):
        file.write_bytes(content)
        with pytest.raises(UsageError, match=said):
            needs(tree(folder))
    file.unlink()
    assert needs(tree(folder)) == ()


@pytest.mark.parametrize(
    ("path", "loaded"),
    [
        ("torch/nn/linear.py", True),
        ("torch/lib/libgomp.so.1", True),
        ("torch/_C.cpython-311-x86_64-linux-gnu.so", True),
        ("torch/bin/torch_shm_manager", True),
        ("torch/bin/protoc", False),
        ("torch/include/c10/core/Device.h", False),
        ("torch/test/test_api.py", False),
        ("sympy/core/tests/test_expr.py", False),
        ("torch/testing/_internal/logging_tensor.py", True),  # torch/utils/checkpoint.py imports it
        ("torch/lib/libprotobuf.a", False),
        ("torch/_C/__init__.pyi", False),
    ],
)
def test_of_an_extra_only_what_a_process_loads(path: str, loaded: bool) -> None:
    assert _is_loaded(path) is loaded


def test_the_libraries_of_a_torch_for_gpus_belong_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    required = {
        "torch": ["filelock", "nvidia-cudnn-cu13==9 ; platform_system == 'Linux'", "cuda-toolkit[cublas]==13"],
        "nvidia-cudnn-cu13": ["nvidia-cublas"],
        "cuda-toolkit": None,
        "nvidia-cublas": ["nvidia-absent>=1"],
    }

    class Installed:
        def __init__(self, name: str) -> None:
            self.requires = required[name]

    monkeypatch.setattr(measuring, "_installed", Installed)
    monkeypatch.setattr(measuring, "_is_installed", lambda name: name in required)
    assert measuring._with_libraries(("torch",)) == [
        "torch", "nvidia-cudnn-cu13", "cuda-toolkit", "nvidia-cublas",
    ]  # fmt: skip
    monkeypatch.undo()
    with pytest.raises(UsageError, match="not installed"):
        measuring._installed("no-such-distribution-of-anybody")
    assert not measuring._is_installed("no-such-distribution-of-anybody")
