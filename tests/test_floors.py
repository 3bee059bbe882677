"""The house stands: no import goes up or sideways, and some things are found nowhere in the sources.

The table is the drawing of CONTRIBUTING.md. A package imports from the floors below it only.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "isolate"

FLOORS = {
    "errors": 0,
    "crypto": 1,
    "sealed": 2, "attestation": 2, "capability": 2, "transparency": 2,
    "channel": 3, "messages": 3,
    "service": 4,
    "enclave": 5, "launch": 5, "client": 5,
    "torch": 6,
    "cli": 7,
    "__init__": 8, "__main__": 8,  # the front door: loads by name, when asked
}  # fmt: skip

# On lower floors, and still not to be imported: the trusted base of an enclave holds no service.
CLOSED = {("enclave", "service")}

# Who may load which distribution. What is not named here is free for all.
KEEPERS = {
    "click": {"cli"},
    "rich": {"cli"},
    "matplotlib": {"cli"},
    "starlette": {"service"},
    "uvicorn": {"service", "cli"},
    "prometheus_client": {"service"},
    "httpx": {"client", "launch", "enclave"},
    "nacl": {"crypto"},
    "nacl.pwhash": {"crypto", "sealed"},  # Argon2id, of the passphrase recipient
    "cryptography": {"crypto"},
    "cbor2": {"crypto", "attestation"},  # foreign evidence, from its raw bytes
    "blake3": {"crypto", "sealed"},
    "jwt": {"attestation"},
    "torch": {"torch", "cli", "sealed"},  # sealed/ gives tensors to a caller who asks for framework="pt"
    "safetensors": {"sealed", "cli"},
    "obstore": {"sealed"},  # these three are extras, loaded when a URL or a key wrapper is used
    "pkcs11": {"sealed"},
    "boto3": {"sealed"},
    "botocore": {"sealed"},
}

# An enclave process may load these top-level packages of others, and no more: the trusted base.
TRUSTED = {
    "_cffi_backend", "_openssl", "_sodium", "attr", "attrs", "blake3", "cbor2", "cffi", "cryptography", "jwt",
    "nacl", "numpy", "structlog", "typing_extensions",
}  # fmt: skip

MAX_LINES = 500
FILES = sorted(SRC.rglob("*.py"))


def package_of(file: Path) -> str:
    """The room that a file is in: the first part of its path below src/isolate."""
    return file.relative_to(SRC).parts[0].removesuffix(".py")


def name(file: Path) -> str:
    return str(file.relative_to(SRC))


@lru_cache(1)
def nodes(tree: ast.AST) -> list[ast.AST]:
    """All of a tree. Each check asks several times for those of one tree."""
    return list(ast.walk(tree))


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call with the last part of the called name."""
    for node in nodes(tree):
        if isinstance(node, ast.Call):
            target = node.func
            if isinstance(target, ast.Name):
                yield target.id, node
            elif isinstance(target, ast.Attribute):
                yield target.attr, node


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported anywhere: in functions, under TYPE_CHECKING, and by a literal name."""
    for node in nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield "." * node.level
            elif node.module == "isolate":
                yield from (f"isolate.{alias.name}" for alias in node.names)
            else:
                yield str(node.module)
    for called, node in calls(tree):
        if called in ("import_module", "__import__") and node.args:
            first = ast.unparse(node.args[0])
            if isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value)
            # f"{__name__}.x" stays in the package that says it.
            elif not first.startswith("f'{__name__}."):
                yield "?"
    for node in nodes(tree):
        # `import isolate` gives the place of the package, and is no way round the floors.
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "isolate":
            yield f"isolate.{node.attr}"


def breaches(package: str, tree: ast.AST) -> list[str]:
    """What this module imports and should not."""
    found = []
    for target in imports(tree):
        room = target.removeprefix("isolate.").split(".")[0]
        if target == "?":
            # Only the front door and the command line load by a name that is computed.
            wrong = FLOORS[package] < FLOORS["cli"]
        elif target.startswith("."):
            wrong = True
        elif target == "isolate":
            wrong = False
        elif target.startswith("isolate."):
            if room in ("__version__", "__file__", "__path__"):
                continue
            if room not in FLOORS:
                # A public name through the front door would go round the floors; above it, it is the way in.
                wrong = FLOORS[package] < FLOORS["cli"]
            else:
                below = FLOORS[room] < FLOORS[package]
                wrong = room != package and (not below or (package, room) in CLOSED)
        else:
            keepers = KEEPERS.get(".".join(target.split(".")[:2]), KEEPERS.get(target.split(".")[0]))
            wrong = keepers is not None and package not in keepers
        if wrong:
            found.append(target)
    return found


@cache
def found_in(file: Path) -> tuple[list[str], list[str]]:
    """What this file imports and should not, and what is dangerous in it."""
    tree, package = ast.parse(file.read_text(encoding="utf-8"), str(file)), package_of(file)
    return breaches(package, tree), dangers(tree, package)


def test_every_room_has_a_floor() -> None:
    assert {package_of(file) for file in FILES} <= set(FLOORS)


@pytest.mark.parametrize("file", FILES, ids=name)
def test_imports_go_down(file: Path) -> None:
    breached, _ = found_in(file)
    assert breached == []


@pytest.mark.parametrize(
    ("package", "line", "good"),
    [
        ("crypto", "from isolate.errors import UsageError", True),
        ("crypto", "from isolate.sealed import layout", False),
        ("crypto", "from isolate.crypto import cbor", True),
        ("sealed", "import isolate.attestation.claims", False),
        ("sealed", "from isolate import attestation", False),
        ("sealed", "def f():\n    from isolate.capability import token", False),
        ("sealed", "if TYPE_CHECKING:\n    from isolate.transparency import proof", False),
        ("channel", "from isolate.messages import base", False),
        ("channel", "from isolate.attestation import result", True),
        ("service", "from isolate.enclave import runtime", False),
        ("enclave", "from isolate.service import state", False),
        ("enclave", "from isolate.client import handle", False),
        ("client", "from isolate.service import state", True),
        ("enclave", "import_module('isolate.service.state')", False),
        ("enclave", "importlib.import_module(name)", False),
        ("enclave", "__import__('isolate.channel')", True),
        ("cli", "import_module(COMMANDS[name])", True),
        ("enclave", "import isolate\nprint(isolate.__file__)", True),
        ("enclave", "import isolate\nisolate.sealed.load_file(path)", True),
        ("enclave", "import isolate\nisolate.Identity.generate()", False),
        ("sealed", "import isolate\nisolate.client.connect()", False),
        ("enclave", "import_module(f'{__name__}.{kind}')", True),
        ("enclave", "import_module(f'isolate.{room}')", False),
        ("enclave", "from isolate import Identity", False),
        ("cli", "from isolate import Identity", True),
        ("enclave", "from isolate import __version__", True),
        ("enclave", "from . import runtime", False),
        ("enclave", "import click", False),
        ("sealed", "from nacl.bindings import crypto_sign", False),
        ("cli", "import click", True),
        ("errors", "from isolate.crypto import secret", False),
    ],
)
def test_the_check_sees(package: str, line: str, good: bool) -> None:
    assert (breaches(package, ast.parse(line)) == []) is good


@pytest.mark.parametrize("file", FILES, ids=name)
def test_no_file_is_longer_than_a_person_reads(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


LOADERS = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "imp"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "system", "popen", "mktemp"}
HARMLESS = {"re.compile", "platform.system"}


def dangers(tree: ast.AST, package: str = "") -> list[str]:
    """Loaders that run what they read, code made from text, shells, and checks that -O removes."""
    found = [target for target in imports(tree) if target.split(".")[0] in LOADERS]
    for called, node in calls(tree):
        # A method of our own by such a name is still worth another name.
        if called in FORBIDDEN_CALLS and ast.unparse(node.func) not in HARMLESS:
            found.append(called)
        # The program may say how its log looks, the library never.
        if called == "configure" and ast.unparse(node.func) == "structlog.configure" and package != "cli":
            found.append("structlog.configure")
        for keyword in node.keywords:
            on = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
            if keyword.arg in ("allow_pickle", "shell") and on:
                found.append(f"{keyword.arg}=True")
    found += ["assert" for node in nodes(tree) if isinstance(node, ast.Assert)]
    return found


@pytest.mark.parametrize("file", FILES, ids=name)
def test_nothing_dangerous_in_the_sources(file: Path) -> None:
    _, dangerous = found_in(file)
    assert dangerous == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from pickle import loads", "import marshal", "eval('1')", "exec(code)",
        "builtins.exec(c)", "compile(text, '', 'exec')", "np.load(f, allow_pickle=True)", "run(c, shell=True)",
        "os.system(c)", "structlog.configure()", "assert ok", "def f():\n    import shelve",
    ],
)  # fmt: skip
def test_the_check_of_dangers_sees(line: str) -> None:
    assert dangers(ast.parse(line)) != []


def test_harmless_lines_pass() -> None:
    assert dangers(ast.parse("re.compile('x'); np.load(f, allow_pickle=False); run(c, shell=False)")) == []


def test_an_enclave_loads_the_trusted_base_only() -> None:
    """The modules of enclave/ are imported in a fresh process, and what it then holds is counted."""
    modules = [
        ".".join(file.relative_to(SRC.parent).with_suffix("").parts).removesuffix(".__init__")
        for file in FILES
        if package_of(file) == "enclave" and file.name != "__main__.py"
    ]
    code = (
        "import sys\nbefore = set(sys.modules)\n"
        + "".join(f"import {module}\n" for module in modules)
        + "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.split()
    tops = {module.split(".")[0] for module in loaded} - set(sys.stdlib_module_names) - {"isolate"}
    assert {top for top in tops if not top.startswith(("_cython", "_isolate"))} <= TRUSTED
    rooms = {module.split(".")[1] for module in loaded if module.startswith("isolate.")}
    assert rooms <= {room for room, floor in FLOORS.items() if floor <= 5} - {"service", "launch", "client"}
