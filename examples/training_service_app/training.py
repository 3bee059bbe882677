"""Data-parallel training on handwritten digits: the program as it was before, with nothing of isolate in it.

Run it: torchrun --nproc-per-node 2 training.py DATA.npz FOLDER
Two workers hold the whole model each (DDP); more share it among them (FSDP2).
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

EPOCHS, BATCH, RATE, MOMENTUM = 8, 64, 0.05, 0.9


def model():
    torch.manual_seed(11)
    return torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))


class Run:
    """Model, optimizer and what is known of the losses: all that a checkpoint holds."""

    def __init__(self):
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

    def epoch(self, pixels, digits):
        """One pass over the data, each worker on its part of every batch. Answers the mean loss."""
        rank, size = dist.get_rank(), dist.get_world_size()
        order = torch.from_numpy(np.random.default_rng(self.done).permutation(len(digits)))
        total = torch.zeros(1, dtype=torch.float64)
        batches = order[: len(order) // BATCH * BATCH].view(-1, BATCH)
        for batch in batches:
            mine = batch[rank::size]
            loss = torch.nn.functional.cross_entropy(self.network(pixels[mine]), digits[mine])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            total += loss.detach()
        dist.all_reduce(total)
        self.losses[self.done] = total / size / len(batches)
        self.done += 1


def train(data, *, reader=None, writer, report=print):
    """``reader``: of a checkpoint to go on from. ``writer(epoch)``: where the next one goes."""
    pixels, digits = torch.from_numpy(data["pixels"]).float() / 16, torch.from_numpy(data["digits"]).long()
    # One rank's rows are everybody's, whatever file each host was given.
    dist.broadcast(pixels, 0)
    dist.broadcast(digits, 0)
    run = Run()
    if reader is not None:
        run.load(reader)
        report("resumed", epoch=run.done)
    while run.done < EPOCHS:
        run.epoch(pixels, digits)
        run.save(writer(run.done))
        report("epoch", epoch=run.done)


def main(data, folder):
    dist.init_process_group("gloo")
    train(
        np.load(data),
        writer=lambda epoch: dcp.FileSystemWriter(folder),
        report=lambda name, **facts: None,
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
