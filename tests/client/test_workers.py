"""Handles in worker processes: forked, spawned, from a fork server, and shipped by cloudpickle as Ray does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from isolate.client.handle import HandleFile
from isolate.client.signers import AgentSigner
from isolate.crypto.signing import SigningKey
from isolate.messages.invoke import Invoke, Reply

# A program of a user: one thread, so that it may fork, and importable again by what is spawned.
PROGRAM = """
import json, multiprocessing, os, sys, threading
from isolate.client import connect
from isolate.client.handle import HandleFile, attach
from isolate.client.signers import AgentSigner, FileSigner

ARGUMENTS = sys.argv[1:]
connect.now = lambda: int(ARGUMENTS[4])
HANDLE = None

def own(file, signer, number):
    with attach(file, signer=signer) as handle:
        return handle.invoke("op", number=number), os.getpid()

def line():
    # Which connection to its agent the signer of this process has.
    return os.fstat(HANDLE._signer._sock.fileno()).st_ino if isinstance(HANDLE._signer, AgentSigner) else 0

def inherited(number):
    return HANDLE.invoke("op", number=number), os.getpid(), line()

def held():
    # A thread of the parent that is in the middle of a use: its lock is held, and nobody here lets it go.
    return HANDLE.invoke("op", number=8), os.getpid()

if __name__ == "__main__":
    method, path, agent, key = ARGUMENTS[:4]
    file, signer = HandleFile.load(path), AgentSigner(agent)
    HANDLE = attach(file, signer=signer if method == "fork of an agent" else FileSigner(key))
    said = {"parent": os.getpid(), "before": HANDLE.invoke("op", number=1), "line": line()}
    context = multiprocessing.get_context(method.split()[0])
    with context.Pool(1) as pool:
        said["own"] = pool.starmap(own, [(file, signer, number) for number in (2, 3)])
        if context.get_start_method() == "fork":
            said["inherited"] = pool.map(inherited, [4, 5])
    if context.get_start_method() == "fork":
        locks = [HANDLE._turn] + ([signer._turn] if HANDLE._signer is signer else [])
        for lock in locks:
            lock.acquire()
        with context.Pool(1) as pool:
            said["held"] = pool.apply_async(held).get(10)
        for lock in locks:
            lock.release()
    said["after"] = HANDLE.invoke("op", number=6)
    print(json.dumps(said))
"""


@pytest.mark.threat("HND-6")
@pytest.mark.parametrize(
    "method",
    ["fork", "fork of an agent", "spawn", "forkserver"],
)
def test_each_worker_has_a_channel_of_its_own_and_the_parents_goes_on(
    method: str, house: Any, key: SigningKey, agent: Any, tmp_path: Path
) -> None:
    seen: list[tuple[bytes, int]] = []

    def answer(request: Invoke) -> Reply:
        seen.append((request.token, request.arguments["number"]))
        return house.echo(request)  # type: ignore[no-any-return]

    house.answer = answer
    file: HandleFile = house.grant(key)
    file.save(tmp_path / "team.handle")
    key.save(tmp_path / "me.key")
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "program.py", method, "team.handle", agent(key).address, "me.key"]
    done = subprocess.run(
        [*command, str(house.realm.clock())], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["before"], said["after"]) == (1, 6)
    own, pids = zip(*said["own"], strict=True)
    assert own == (2, 3) and said["parent"] not in pids
    if method.startswith("fork") and method != "forkserver":
        answers, pids, lines = zip(*said["inherited"], strict=True)
        assert answers == (4, 5) and said["parent"] not in pids
        # Over one connection to an agent, each would take the other's signatures.
        assert lines == (0, 0) if method == "fork" else said["line"] not in lines
        assert said["held"][0] == 8
    assert sorted(number for _, number in seen) == sorted(
        {1, 2, 3, 6} | ({4, 5, 8} if "inherited" in said else set())
    )
    # The parent's one channel served it before and after; each worker's use of its own handle opened another.
    assert house.channels == 1 + 2 + (2 if "inherited" in said else 0)


LOOPS = """
import asyncio, multiprocessing, os, sys
from isolate.client import aio, connect
from isolate.client.handle import HandleFile
from isolate.client.signers import AgentSigner

connect.now = lambda: int(sys.argv[3])

async def attached():
    handle = await aio.attach(sys.argv[1], signer=AgentSigner(sys.argv[2]))
    print(await handle.invoke("op", number=1))
    return handle

async def use(number):
    return await asyncio.gather(*(HANDLE.invoke("op", number=number + more) for more in (0, 1)))

def worker(number):
    return asyncio.run(use(number))

async def around():
    global HANDLE
    HANDLE = await attached()
    with multiprocessing.get_context("fork").Pool(1) as pool:
        print(await asyncio.to_thread(pool.map, worker, [2, 4]))
    print(await use(6))
    await HANDLE.close()

asyncio.run(around())
"""


@pytest.mark.threat("HND-6")
def test_a_forked_worker_uses_an_async_handle_in_a_loop_of_its_own(
    house: Any, key: SigningKey, agent: Any, tmp_path: Path
) -> None:
    house.grant(key).save(tmp_path / "team.handle")
    command = [sys.executable, "-c", LOOPS, "team.handle", agent(key).address, str(house.realm.clock())]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["1", "[[2, 3], [4, 5]]", "[6, 7]"], done.stderr
    # One channel in the parent, throughout; one in the worker for each event loop.
    assert house.channels == 3


def test_a_task_for_another_machine_carries_a_handle_and_no_key(
    house: Any, key: SigningKey, agent: Any, tmp_path: Path
) -> None:
    """As Ray ships a function: by cloudpickle, with what it closes over."""
    file, signer, now = house.grant(key), AgentSigner(agent(key).address), house.realm.clock()

    def task() -> Any:
        import isolate
        from isolate.client import connect

        connect.now = lambda: now
        with isolate.attach(file, signer=signer) as handle:
            return handle.invoke("op", number=7)

    shipped = cloudpickle.dumps(task)
    assert bytes(key._seed.expose()) not in shipped
    (tmp_path / "task").write_bytes(shipped)
    code = "import cloudpickle, pathlib; print(cloudpickle.loads(pathlib.Path('task').read_bytes())())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout == "7\n", done.stderr
