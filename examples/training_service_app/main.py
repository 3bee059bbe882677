"""The same training as an enclave: attested workers, encrypted gradients, sealed data in, sealed checkpoints out.

Mode: workload. This code sees plaintext, because the owner's policy names its measurement.
"""

import os

import torch.distributed as dist
import training

import isolate
from isolate.errors import RankFailed
from isolate.torch import SealedDataLoader, SealedDataset, SealedStorageReader, SealedStorageWriter

DATA, MODEL = "digits/train", "digits/model"


def blame(workload):
    """Of an error within DDP only the text gets here. The group is over then, and still says on account of whom."""
    try:
        dist.barrier()
    except RankFailed as failed:
        workload.report("over", by=failed.rank, code=failed.code)


def main():
    with isolate.join() as workload:
        dist.init_process_group("isolate", pg_options=workload)
        slot = workload.slot
        workload.report(
            "joined", rank=slot.rank, of=dist.get_world_size(), generation=slot.generation, pid=os.getpid()
        )
        folder = workload.locate(MODEL).with_suffix("")
        try:
            training.train(
                SealedDataset(workload.locate(DATA), identity=workload),
                loader=SealedDataLoader,  # num_workers= where reading takes time: here starting one takes more
                reader=SealedStorageReader(folder, identity=workload) if folder.exists() else None,
                writer=lambda epoch: SealedStorageWriter(
                    folder, sign=workload, model_id=MODEL, epoch=epoch, overwrite=True
                ),
                report=workload.report if slot.rank == 0 else lambda name, **facts: None,
            )
        except RuntimeError:
            blame(workload)
            raise
        dist.destroy_process_group()


main()
