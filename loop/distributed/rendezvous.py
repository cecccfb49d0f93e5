"""How ranks find each other, on one machine or many: with a deadline, and naming those absent.

torch's own rendezvous waits in silence and ends with "timed out". Here every rank leaves its name
in a store where all can read it.
"""

import datetime
import os
import socket
import sys
import time

import torch.distributed as dist

from .stop import StopRequest

LOOPBACK = ("127.0.0.1", "localhost")  # a run on one machine
ANNOUNCE_SECONDS = 20  # rank 0 says whom it waits for


class RendezvousError(RuntimeError):
    """Not all ranks came. Exit code 1: nothing that was typed need be wrong."""


def join_process_group(
    backend: str, minutes: float, timeout: datetime.timedelta, stop: StopRequest | None = None
) -> None:
    """Makes the process group of all ranks. Machines may start at different times.

    Args:
        backend: nccl or gloo.
        minutes: how long ranks wait for each other.
        timeout: of a later collective.
        stop: a request to stop ends the waiting.

    Raises RendezvousError.
    """
    rank = int(os.environ["RANK"])
    world_size = int(os.environ["WORLD_SIZE"])
    host = os.environ["MASTER_ADDR"]
    port = int(os.environ["MASTER_PORT"])
    started = time.monotonic()
    # torchrun's agent runs the store itself.
    agent_has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_server = rank == 0 and not agent_has_store
    try:
        store = dist.TCPStore(
            host,
            port,
            None,
            is_server,
            datetime.timedelta(minutes=minutes),
            wait_for_workers=False,
            master_listen_fd=listen_here_alone(port) if is_server and host in LOOPBACK else None,
        )
        store.set(f"joined/{rank}", backend)
        _wait_for_all(store, started, minutes, stop)
        _check_backend(store, backend)
    except dist.DistError as error:  # rank 0's machine does not answer
        reason = str(error).strip().splitlines()[0][:100]
        raise RendezvousError(
            f"rank {rank}: {host}:{port} (MASTER_ADDR, MASTER_PORT) gave no answer within "
            f"run.rendezvous_timeout_minutes={minutes:g}; is rank 0 started, and the port open? "
            f"({reason})"
        ) from error
    store.set_timeout(timeout)
    try:
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("loop", store),
            rank=rank,
            world_size=world_size,
            timeout=timeout,
        )
    except RuntimeError as error:  # of a network interface that is not there
        reason = str(error).strip().splitlines()[0][:160]
        raise RendezvousError(
            f"rank {rank}: {backend} can't connect the ranks ({reason}); see GLOO_SOCKET_IFNAME "
            "and NCCL_SOCKET_IFNAME"
        ) from error


def listen_here_alone(port: int) -> int:
    """The descriptor of a socket that listens on the loopback; TCPStore's own hears the network.

    Raises RendezvousError where the port is taken.
    """
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
    except OSError as error:
        raise RendezvousError(f"MASTER_PORT={port}: {error.strerror}; name another") from error
    listener.listen(128)
    return listener.detach()


def keep_to_this_machine() -> None:
    """Lets the ranks of one machine exchange tensors over its loopback alone, on Linux."""
    if os.environ.get("MASTER_ADDR") in LOOPBACK and os.path.exists("/sys/class/net/lo"):
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")


def _wait_for_all(
    store: dist.Store, started: float, minutes: float, stop: StopRequest | None
) -> None:
    """Returns when every rank's name is in the store. started: on the monotonic clock."""
    rank = int(os.environ["RANK"])
    world_size = int(os.environ["WORLD_SIZE"])
    limit = f"run.rendezvous_timeout_minutes={minutes:g}"
    announced = False
    missing = list(range(world_size))
    while True:
        missing = [r for r in missing if not store.check([f"joined/{r}"])]
        if not missing:
            return
        waited = time.monotonic() - started
        names = f"rank {', '.join(map(str, missing))} of {world_size}"
        # The time limit counts at a step's end.
        if stop and stop.reason not in (None, "run.max_hours"):
            raise RendezvousError(
                f"rank {rank}: asked to stop ({stop.reason}) while it waited for {names}"
            )
        if waited > 60 * minutes:
            raise RendezvousError(
                f"{names} did not come within {limit}; are all machines started, with the same "
                "number of ranks?"
            )
        if rank == 0 and waited > ANNOUNCE_SECONDS and not announced:
            announced = True
            print(f"waiting for {names}, up to {limit}", file=sys.stderr, flush=True)
        time.sleep(0.2)


def _check_backend(store: dist.Store, backend: str) -> None:
    """Two backends would wait for each other's first collective for ever."""
    theirs = store.get("joined/0").decode()
    if backend != theirs:
        raise RendezvousError(
            f"rank {os.environ['RANK']} on {socket.gethostname()} would use {backend}, and rank 0 "
            f"{theirs}: does nvidia-smi find the GPUs of both?"
        )
