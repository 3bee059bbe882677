"""Sealed checkpoints through torch's own dcp.save and dcp.load: what goes in comes out, at any world size."""

from __future__ import annotations

import math
import pickle
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isolate import Identity, SigningKey, sealed
from isolate.errors import IsolateError, MalformedError, RolledBack, UsageError

torch = pytest.importorskip("torch", reason="torch is an extra: pip install 'isolate-confidential[torch]'")
dcp = pytest.importorskip("torch.distributed.checkpoint")

from isolate.torch import checkpoint  # noqa: E402
from isolate.torch.checkpoint import SealedStorageReader, SealedStorageWriter  # noqa: E402
from isolate.torch.checkpoint_values import decode_value, encode_value  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:torch.distributed is unavailable"),
]

DTYPES = [
    "bool", "uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float16", "bfloat16",
    "float32", "float64", "complex64", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float4_e2m1fn_x2",
]  # fmt: skip


@pytest.fixture
def writer(tmp_path: Path, owner: SigningKey, identity: Identity) -> Any:
    """Makes writers for one folder."""

    def make(**options: Any) -> SealedStorageWriter:
        return SealedStorageWriter(
            tmp_path / "run", **({"recipients": [identity.recipient], "sign": owner, "threads": 1} | options)
        )

    return make


@pytest.fixture
def reader(tmp_path: Path, owner: SigningKey, identity: Identity) -> Any:
    """Makes readers of the same folder."""

    def make(**options: Any) -> SealedStorageReader:
        pins = {"identity": identity, "signed_by": owner.verifying_key, "threads": 1}
        return SealedStorageReader(tmp_path / "run", **(pins | options))

    return make


def refused(work: Any) -> IsolateError:
    """Our error inside the exception that torch makes of it."""
    with pytest.raises(dcp.api.CheckpointException) as caught:
        work()
    found = checkpoint.refusal(caught.value)
    assert found is not None, str(caught.value)
    return found


def as_raw(tensor: Any) -> Any:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def test_every_dtype_comes_back_bit_by_bit(writer: Any, reader: Any) -> None:
    raw = torch.arange(48, dtype=torch.uint8)
    saved = {}
    for name in DTYPES:
        kind = getattr(torch, name)
        saved[name] = (raw % 2 if name == "bool" else raw).view(kind).reshape(2, -1)
    saved |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "turned": torch.rand(3, 4).T,
              "conj": torch.tensor([1 + 2j], dtype=torch.complex64).conj(),
              "parameter": torch.nn.Parameter(torch.rand(2))}  # fmt: skip
    dcp.save(dict(saved), storage_writer=writer())
    found = {
        name: torch.zeros_like(tensor.detach()) for name, tensor in saved.items() if name != "float4_e2m1fn_x2"
    }
    found["float4_e2m1fn_x2"] = torch.zeros(2, 24, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    dcp.load(found, storage_reader=reader())
    for name, tensor in saved.items():
        assert torch.equal(as_raw(found[name]), as_raw(tensor.detach().resolve_conj())), name


def test_a_model_and_its_optimizer_come_back_without_a_pickle(
    writer: Any, reader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def training(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=seed / 10)
        model(torch.ones(1, 8)).sum().backward()
        optimizer.step()
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": seed, "best": math.inf}

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("a pickle")

    saved, found = training(1), training(2)
    with monkeypatch.context() as patch:
        for module, name in [(pickle, "loads"), (pickle, "load"), (pickle, "dump"), (pickle, "dumps"),
                             (torch, "load"), (torch, "save")]:  # fmt: skip
            patch.setattr(module, name, never)
        dcp.save(saved, storage_writer=writer())
        dcp.load(found, storage_reader=reader())
    assert (found["step"], found["best"]) == (1, math.inf)
    assert found["optimizer"]["param_groups"] == saved["optimizer"]["param_groups"]
    assert found["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.999)
    for name, tensor in saved["model"].items():
        assert torch.equal(found["model"][name], tensor)
    for index, state in saved["optimizer"]["state"].items():
        assert torch.equal(found["optimizer"]["state"][index]["exp_avg"], state["exp_avg"])


def test_a_checkpoint_is_loaded_without_knowing_what_it_holds(writer: Any, reader: Any) -> None:
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

    dcp.save({"a": {"w": torch.ones(2)}, "notes": ["x", {"y": 1.5}]}, storage_writer=writer())
    found = _load_state_dict_from_keys(storage_reader=reader())
    assert found["notes"] == ["x", {"y": 1.5}] and torch.equal(found["a"]["w"], torch.ones(2))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text() | st.integers(-9, 9), inner, max_size=3)
    ),
    max_leaves=8,
)


def same(one: Any, two: Any) -> bool:
    """Equal, of the same types, in the same order, and floats bit by bit."""
    if type(one) is not type(two):
        return False
    if isinstance(one, float):
        return one.hex() == two.hex()
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, dict):
        return list(one) == list(two) and all(map(same, one.values(), two.values()))
    return bool(one == two)


@given(VALUES)
def test_every_value_comes_back_as_it_was(value: Any) -> None:
    try:
        raw = encode_value(value)
    except UsageError as error:
        assert "nested" in error.message
        return
    assert same(decode_value(raw), value) and encode_value(decode_value(raw)) == raw


@given(st.binary(max_size=40))
def test_bytes_that_are_no_value_are_malformed(raw: bytes) -> None:
    try:
        value = decode_value(raw)
    except MalformedError:
        return
    # Anything else is what the encoder makes of it, or maps that are written another way.
    assert encode_value(value) == raw


class Unknown:
    def __repr__(self) -> str:
        return "a secret"


@pytest.mark.parametrize(
    "value",
    [{1, 2}, Unknown(), 2**64, range(3), ({("a",): 1},), ({None: 1},), 1j, (Unknown(),), bytearray(2)],
    ids=repr,
)
def test_a_value_without_a_form_is_refused_with_what_to_do(writer: Any, value: Any, tmp_path: Path) -> None:
    state = {"w": torch.ones(2), "extra": [value]}
    error = refused(lambda: dcp.save(state, storage_writer=writer()))
    assert type(error) is UsageError and error.hint and "secret" not in str(error)
    assert error.message.startswith("extra")
    assert not list((tmp_path / "run").rglob("*.sealed"))


@pytest.mark.parametrize(
    "tensor", [torch.eye(2).to_sparse(), torch.ones(2, dtype=torch.complex128), torch.ones(2, device="meta")],
    ids=["sparse", "complex128", "meta"],
)  # fmt: skip
def test_a_tensor_without_a_form_is_refused_with_what_to_do(writer: Any, tensor: Any) -> None:
    error = refused(lambda: dcp.save({"w": tensor}, storage_writer=writer()))
    assert type(error) is UsageError and error.hint


def halves(part: Any, tensor: Any, world: int, dim: int) -> list[Any]:
    """The tensor in parts for each rank, split as evenly as it goes; the last ones may be empty."""
    step, parts = -(-tensor.shape[dim] // world), []
    for rank in range(world):
        start = min(rank * step, tensor.shape[dim])
        sizes, offsets = list(tensor.shape), [0] * tensor.ndim
        offsets[dim], sizes[dim] = start, min(step, tensor.shape[dim] - start)
        parts.append(part(tensor, offsets, sizes))
    return parts


@pytest.mark.parametrize(
    ("saved_by", "saved_dim", "loaded_by", "loaded_dim"),
    [(2, 0, 2, 0), (2, 0, 3, 0), (4, 0, 1, 0), (2, 1, 3, 0), (3, 0, 2, 1), (2, 2, 4, 2), (5, 0, 2, 0)],
)
def test_another_world_size_loads_it(
    writer: Any, reader: Any, world: Any, part: Any, saved_by: int, saved_dim: int, loaded_by: int, loaded_dim: int
) -> None:
    whole = torch.rand(7, 6, 5, dtype=torch.float64)
    other = torch.randint(-9, 9, (3, 4, 2))
    alike = torch.rand(4)
    states = [
        {"w": w, "v": v, "alike": alike.clone(), "step": 3}
        for w, v in zip(
            halves(part, whole, saved_by, saved_dim), halves(part, other, saved_by, saved_dim), strict=True
        )
    ]
    writers = [writer(epoch=4) for _ in range(saved_by)]
    world.save(states, writers)
    zero = [
        {"w": w, "v": v, "alike": torch.zeros(4), "step": 0}
        for w, v in zip(
            halves(part, torch.zeros_like(whole), loaded_by, loaded_dim),
            halves(part, torch.zeros_like(other), loaded_by, loaded_dim),
            strict=True,
        )
    ]
    world.load(zero, [reader(expect=sealed.Epoch(4)) for _ in range(loaded_by)])
    expected_w, expected_v = halves(part, whole, loaded_by, loaded_dim), halves(part, other, loaded_by, loaded_dim)
    for state, w, v in zip(zero, expected_w, expected_v, strict=True):
        assert torch.equal(state["w"].local, w.local) and torch.equal(state["v"].local, v.local)
        assert torch.equal(state["alike"], alike) and state["step"] == 3
    world.load(zero, [reader(signed_by=None, expect=writers[0].digest) for _ in range(loaded_by)])


def test_another_dtype_or_stride_in_memory_is_filled_too(writer: Any, reader: Any) -> None:
    whole = torch.rand(6, 4)
    dcp.save({"w": whole, "v": whole}, storage_writer=writer())
    found = {"w": torch.zeros(6, 4, dtype=torch.float16), "v": torch.zeros(4, 6).T}
    dcp.load(found, storage_reader=reader())
    assert torch.equal(found["w"], whole.half()) and torch.equal(found["v"], whole)


def test_a_checkpoint_that_stands_there_is_replaced_only_on_request(
    writer: Any, reader: Any, tmp_path: Path
) -> None:
    dcp.save({"w": torch.ones(2)}, storage_writer=writer(epoch=1))
    error = refused(lambda: dcp.save({"w": torch.ones(2)}, storage_writer=writer(epoch=2)))
    assert type(error) is UsageError and "overwrite" in error.hint
    dcp.save({"w": torch.full((2,), 5.0)}, storage_writer=writer(epoch=2, overwrite=True))
    found = {"w": torch.zeros(2)}
    dcp.load(found, storage_reader=reader(expect=sealed.Epoch(2)))
    assert found["w"].tolist() == [5.0, 5.0]
    assert len(list((tmp_path / "run").iterdir())) == 2  # the manifest, and one save
    error = refused(lambda: dcp.load(found, storage_reader=reader(expect=sealed.Epoch(3))))
    assert type(error) is RolledBack


def test_async_save_in_a_thread_copies_first(writer: Any, reader: Any) -> None:
    state = {"w": torch.ones(1000), "step": 1}
    future = dcp.async_save(state, storage_writer=writer())
    state["w"].zero_()
    future.result()
    found = {"w": torch.zeros(1000), "step": 0}
    dcp.load(found, storage_reader=reader())
    assert found["step"] == 1 and bool((found["w"] == 1).all())


@pytest.mark.threat("CKPT-7")
def test_async_save_by_another_process_is_refused_before_a_tensor_leaves(
    writer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch pickles the state dict for that process, and each tensor in it into a file of shared memory."""
    shared = []
    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", lambda self, *_: shared.append(self))
    one = writer()
    staged = one.stage({"w": torch.ones(1000)})
    request = {"staged_state_dict": staged, "storage_writer": one}  # in torch's order
    with pytest.raises(UsageError, match="shared memory"):
        ForkingPickler.dumps(request)
    with pytest.raises(UsageError, match="holds keys"):
        ForkingPickler.dumps(one)
    assert shared == []
    with pytest.raises(TypeError):  # the double answers nothing
        ForkingPickler.dumps(dict(staged))
    assert len(shared) == 1, "the control: what torch does with a plain dict"


def test_what_torch_cannot_bind_is_refused(writer: Any) -> None:
    one = writer()
    with pytest.raises(UsageError, match="use_collectives"):
        one.set_up_storage_writer(True, rank=0, use_collectives=False)
    planner = dcp.DefaultSavePlanner(enable_plan_caching=True)
    for _ in range(2):
        state = {"w": torch.ones(2)}
        try:
            dcp.save(state, storage_writer=writer(overwrite=True), planner=planner)
        except dcp.api.CheckpointException as error:
            assert "cached" in str(checkpoint.refusal(error))
            break
    else:
        pytest.fail("a cached plan was taken")


def test_keys_do_not_travel(writer: Any, reader: Any) -> None:
    for one in (writer(), reader()):
        with pytest.raises(UsageError):
            pickle.dumps(one)


def test_who_can_open_it_must_be_said(tmp_path: Path, owner: SigningKey) -> None:
    with pytest.raises(UsageError, match="recipients"):
        SealedStorageWriter(tmp_path, sign=owner)
    with pytest.raises(UsageError, match="sign="):
        SealedStorageWriter(tmp_path, sign="key", recipients=[])  # type: ignore[arg-type]


def test_a_checkpoint_in_an_object_store(owner: SigningKey, identity: Identity) -> None:
    pytest.importorskip("obstore", reason="obstore is an extra: pip install 'isolate-confidential[stores]'")
    url = "memory://checkpoints/run/1"
    for epoch in (1, 2):
        writer = SealedStorageWriter(
            url, recipients=[identity.recipient], sign=owner, epoch=epoch, overwrite=True, threads=1
        )
        dcp.save({"w": torch.full((3,), float(epoch))}, storage_writer=writer)
    found = {"w": torch.zeros(3)}
    dcp.load(found, storage_reader=SealedStorageReader(url, identity=identity, expect=writer.digest))
    assert found["w"].tolist() == [2, 2, 2]
