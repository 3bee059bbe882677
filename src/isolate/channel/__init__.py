"""Floor 3: channels between attested ends, encrypted and mutually authenticated (docs/spec/channel.md).

*Workload* mode: both ends are measured code and see plaintext; the operator between them sees none.

    with channel.listen("unix:/run/a", identity=attested, expect=Expect(job="train", rank=1, ...)) as listener:
        with listener.accept() as peer:
            peer.send(gradient)
            peer.recv_into(gradient)
"""

from isolate.channel.blocking import Channel
from isolate.channel.handshake import Handshake, Session
from isolate.channel.peers import Attested, AttestedPeer, Expect, Holder, HolderPeer
from isolate.channel.record import RekeyLimits
from isolate.channel.streams import Listener, connect, listen

__all__ = [
    "Attested",
    "AttestedPeer",
    "Channel",
    "Expect",
    "Handshake",
    "Holder",
    "HolderPeer",
    "Listener",
    "RekeyLimits",
    "Session",
    "connect",
    "listen",
]
