"""Data-parallel training on handwritten digits: the program as it was before, with nothing of isolate in it.

Run it: torchrun --nproc-per-node 2 training.py DATA.npz FOLDER
Two workers hold the whole model each (DDP); more share it among them (FSDP2).
"""

import gc
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

EPOCHS, BATCH, RATE, MOMENTUM = 8, 64, 0.05, 0.9
COMPARED = 256  # rows


def model():
    torch.manual_seed(11)
    return torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))


class Rows(Dataset):
    """The rows of DATA.npz."""

    def __init__(self, path):
        with np.load(path) as columns:
            self.columns = {name: torch.from_numpy(columns[name]) for name in columns}

    def __len__(self):
        return len(self.columns["digits"])

    def __getitem__(self, row):
        return {name: column[row] for name, column in self.columns.items()}


class Steps:
    """The rows of each step of an epoch: an order that all workers draw alike, and of every batch each its part."""

    def __init__(self, rows):
        self.rows, self.epoch = rows, 0

    def __len__(self):
        return self.rows // BATCH

    def __iter__(self):
        order = np.random.default_rng(self.epoch).permutation(self.rows)[: len(self) * BATCH]
        for batch in order.reshape(-1, BATCH):
            yield batch[dist.get_rank() :: dist.get_world_size()].tolist()


class Run:
    """Model, optimizer and what is known of the losses: all that a checkpoint holds."""

    def __init__(self, data, loader):
        self.steps = Steps(len(data))
        self.batches = loader(data, batch_sampler=self.steps)
        self.network = model()
        if dist.get_world_size() > 2:
            fully_shard(self.network)
        else:
            self.network = DistributedDataParallel(self.network)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=RATE, momentum=MOMENTUM)
        self.losses = torch.zeros(EPOCHS, dtype=torch.float64)
        self.done = 0

    def state(self):
        network, optimizer = get_state_dict(self.network, self.optimizer)
        return {"model": network, "optimizer": optimizer, "losses": self.losses, "done": self.done}

    def save(self, writer):
        dcp.save(self.state(), storage_writer=writer)

    def load(self, reader):
        state = self.state()
        dcp.load(state, storage_reader=reader)
        set_state_dict(
            self.network, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        self.losses, self.done = state["losses"], state["done"]

    def epoch(self):
        """One pass over the data. Its mean loss is kept."""
        self.steps.epoch = self.done
        total = torch.zeros(1, dtype=torch.float64)
        for batch in self.batches:
            guessed = self.network(batch["pixels"].float() / 16)
            loss = torch.nn.functional.cross_entropy(guessed, batch["digits"].long())
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            total += loss.detach()
        dist.all_reduce(total)
        self.losses[self.done] = total / dist.get_world_size() / len(self.steps)
        self.done += 1


def same_everywhere(data):
    """Each host was given the data for itself: what rank 0 has must be there too."""
    own = torch.stack([data[row]["pixels"] for row in range(min(COMPARED, len(data)))])
    first = own.clone()
    dist.broadcast(first, 0)
    if not torch.equal(own, first):
        raise ValueError(f"rank {dist.get_rank()} was given other data than rank 0")


def train(data, *, loader=DataLoader, reader=None, writer, report=print):
    """``data``: a map-style dataset, and the ``loader`` for it. ``reader``: of a checkpoint to go on from.

    ``writer(epoch)``: where the next one goes.
    """
    same_everywhere(data)
    run = Run(data, loader)
    if reader is not None:
        run.load(reader)
        report("resumed", epoch=run.done)
    while run.done < EPOCHS:
        run.epoch()
        run.save(writer(run.done))
        report("epoch", epoch=run.done)


def main(data, folder):
    dist.init_process_group("gloo")
    train(
        Rows(data),
        writer=lambda epoch: dcp.FileSystemWriter(folder),
        report=lambda name, **facts: None,
    )
    gc.collect()  # DDP is in cycles, and holds the group; gloo must not outlive Python
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
