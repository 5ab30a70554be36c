"""Peer keys: who may send to whom in a run. Every end has a CURVE key pair of its own, made anew for the run.

Each end is given its own secret key and everybody's public ones, by Ray, before it is reached. Connections are then
encrypted, both sides are authenticated (CurveZMQ, ZeroMQ RFC 26), and what arrives is known to be from one peer.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace

import zmq
from zmq.auth.thread import ThreadAuthenticator

DOMAIN = "run"  # of the authentication: all sockets of an end are in it


@dataclass(frozen=True, slots=True)
class PeerKeys:
    """What one end holds: its secret key, and the public keys of all ends, its own among them (z85 text)."""

    actor: int
    secret: bytes = field(repr=False)
    public: Mapping[int, bytes]


def new_keys(actors: Iterable[int]) -> dict[int, PeerKeys]:
    """Fresh keys for each of these ends."""
    pairs = {actor: zmq.curve_keypair() for actor in actors}
    public = {actor: pair[0] for actor, pair in pairs.items()}
    return {actor: PeerKeys(actor, pair[1], public) for actor, pair in pairs.items()}


class Gate:
    """Lets only the run's own ends in: the answer to every handshake on the sockets of a context."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", keys: PeerKeys) -> None:
        known = frozenset(keys.public.values())
        self._authenticator = ThreadAuthenticator(context)
        self._authenticator.log.disabled = True  # strangers that are turned away are nobody's news
        self._authenticator.start()
        # asked with the domain and the public key of who knocks, whether to let it in
        asked = SimpleNamespace(callback=lambda _, key: key in known)
        self._authenticator.configure_curve_callback(DOMAIN, asked)

    def close(self) -> None:
        """End the thread that answers."""
        self._authenticator.stop()


def guard(socket: "zmq.Socket[bytes]", keys: PeerKeys) -> None:
    """Make a socket, not yet bound, one that only peers reach."""
    socket.curve_server = True
    socket.curve_secretkey = keys.secret
    socket.zap_domain = DOMAIN.encode()


def present(socket: "zmq.Socket[bytes]", keys: PeerKeys, peer: int) -> None:
    """Make a socket, not yet connected, one that speaks for this end to `peer` and nobody else."""
    socket.curve_serverkey = keys.public[peer]
    socket.curve_publickey = keys.public[keys.actor]
    socket.curve_secretkey = keys.secret
