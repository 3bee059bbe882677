"""What the tests of isolate.torch share: keys, and ranks that save and load without processes.

A World carries out the steps of torch.distributed.checkpoint for several ranks in one process, in the order in
which torch takes them over a process group; ``between`` sees what would travel, and may change it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from isolate import Identity, SigningKey
from isolate.crypto.secret import Secret

# The realm of tests/service/conftest.py: a whole service in one process, and enclaves that speak to it.
_spec = importlib.util.spec_from_file_location(
    "realm_fixtures", Path(__file__).parents[1] / "service" / "conftest.py"
)
assert _spec is not None and _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)

mould, realm, realms = _module.mould, _module.realm, _module.realms


@pytest.fixture(scope="session")
def owner() -> SigningKey:
    return SigningKey(Secret(b"owner".ljust(32, b".")))


@pytest.fixture(scope="session")
def stranger() -> SigningKey:
    return SigningKey(Secret(b"stranger".ljust(32, b".")))


@pytest.fixture(scope="session")
def identity() -> Identity:
    return Identity(Secret(b"identity".ljust(32, b".")))


class World:
    """``save`` and ``load``: a state dict and a storage writer or reader for each rank."""

    @staticmethod
    def save(
        states: Sequence[dict[str, Any]], writers: Sequence[Any], between: Callable[[str, Any], Any] | None = None
    ) -> Any:
        planners = importlib.import_module("torch.distributed.checkpoint.default_planner")
        change = between or (lambda _, value: value)
        chosen = [planners.DefaultSavePlanner() for _ in states]
        plans = []
        for rank, (state, writer, planner) in enumerate(zip(states, writers, chosen, strict=True)):
            writer.reset()
            planner.set_up_planner(state, writer.storage_meta(), rank == 0)
            writer.set_up_storage_writer(rank == 0, rank=rank, use_collectives=True)
            plans.append(writer.prepare_local_plan(planner.create_local_plan()))
        plans, metadata = chosen[0].create_global_plan(plans)
        plans = change("plans", writers[0].prepare_global_plan(plans))
        results = []
        for plan, writer, planner in zip(plans, writers, chosen, strict=True):
            results.append(writer.write_data(planner.finish_plan(plan), planner).value())
        writers[0].finish(metadata, change("results", results))
        return metadata

    @staticmethod
    def load(states: Sequence[dict[str, Any]], readers: Sequence[Any]) -> None:
        planners = importlib.import_module("torch.distributed.checkpoint.default_planner")
        chosen = [planners.DefaultLoadPlanner() for _ in states]
        plans = []
        for rank, (state, reader, planner) in enumerate(zip(states, readers, chosen, strict=True)):
            reader.reset()
            metadata = reader.read_metadata()
            planner.set_up_planner(state, metadata, rank == 0)
            reader.set_up_storage_reader(metadata, rank == 0, rank=rank)
            plans.append(reader.prepare_local_plan(planner.create_local_plan()))
        plans = readers[0].prepare_global_plan(chosen[0].create_global_plan(plans))
        for plan, reader, planner in zip(plans, readers, chosen, strict=True):
            reader.read_data(planner.finish_plan(plan), planner).wait()


@pytest.fixture(scope="session")
def world() -> type[World]:
    return World


@pytest.fixture(scope="session")
def part() -> Callable[..., Any]:
    """part(whole, offsets, sizes): one rank's box of a tensor, which torch plans with as with a DTensor."""
    torch = importlib.import_module("torch")
    metadata = importlib.import_module("torch.distributed.checkpoint.metadata")
    planner = importlib.import_module("torch.distributed.checkpoint.planner")

    class Part(torch.Tensor):  # type: ignore[misc, name-defined]
        local: Any
        box: Any
        shape_of_all: Any

        def size(self) -> Any:
            return self.shape_of_all

        def __create_write_items__(self, name: str, _: Any) -> list[Any]:
            properties = metadata.TensorProperties.create_from_tensor(self.local)
            data = planner.TensorWriteData(self.box, properties, self.shape_of_all)
            index = metadata.MetadataIndex(name, self.box.offsets)
            return [planner.WriteItem(index, planner.WriteItemType.SHARD, tensor_data=data)]

        def __create_chunk_list__(self) -> list[Any]:
            return [self.box]

        def __get_tensor_shard__(self, _: Any) -> Any:
            return self.local

    def make(whole: Any, offsets: Sequence[int], sizes: Sequence[int]) -> Any:
        index = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
        local = whole[index].clone()
        made = torch.Tensor._make_subclass(Part, local)
        made.local, made.shape_of_all = local, torch.Size(whole.shape)
        made.box = metadata.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        return made

    return make
