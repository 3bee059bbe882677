"""A training enclave: opens sealed data, trains with its peer over an attested channel, seals the result.

Mode: workload. This code sees plaintext, because the owner's policy names its measurement.
"""

import network
import numpy as np

import isolate
from isolate.enclave.runtime import peer_pid
from isolate.errors import ChannelError

ROUNDS = 24  # of the second channel, on which the operator is invited to lie


def link(workload, purpose, listener):
    """An attested channel to the other rank: rank 0 listens, rank 1 connects."""
    if listener is None:
        return workload.connect(purpose, rank=0)
    channel = listener.accept()
    workload.report("channel_accepted", peer_pid=peer_pid(channel))
    return channel


def all_reduce(channel, rank, mine):
    """Both halves, added in the order of the ranks, so that every run adds the same way."""
    theirs = np.empty_like(mine)
    if rank == 0:
        channel.recv_into(theirs)
        channel.send(mine)
        return mine + theirs
    channel.send(mine)
    channel.recv_into(theirs)
    return theirs + mine


def train(workload, channel):
    train = isolate.sealed.load_file(workload.locate("digits/train"), identity=workload)
    weights = isolate.sealed.load_file(workload.locate("digits/weights"), identity=workload)
    rank, seed = workload.slot.rank, workload.configuration.parameters["seed"]

    def summed(weights, pixels, digits, batch):
        return all_reduce(channel, rank, network.half(weights, pixels, digits, batch, rank))

    return network.train(weights, train["pixels"], train["digits"], seed=seed, summed=summed)


def doubtful(channel, rank):
    """Exchange vectors that both sides can foretell, until the channel ends. Answers its code, and wrong ones."""
    taken_wrong = 0
    try:
        for turn in range(ROUNDS):
            expected = np.full(2048, turn, np.float32)
            if rank == 1:
                channel.send(expected)
            found = np.empty_like(expected)
            channel.recv_into(found)
            taken_wrong += not np.array_equal(found, expected)
            if rank == 0:
                channel.send(expected)
        channel.close()
    except ChannelError as error:
        return error.code, taken_wrong
    return "", taken_wrong


def main():
    with isolate.join() as workload:
        rank = workload.slot.rank
        workload.report("attested", rank=rank, instance=workload.result.instance.hex())
        listener = workload.listen("gradients", rank=1) if rank == 0 else None
        with link(workload, "gradients", listener) as channel:
            trained = train(workload, channel)
        if rank == 0:
            workload.seal("digits/model", trained, epoch=1)
        workload.report("trained", rank=rank)
        code, taken_wrong = doubtful(link(workload, "gradients", listener), rank)
        workload.report("channel_ended", code=code, taken_wrong=taken_wrong)


main()
