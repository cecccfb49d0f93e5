"""How ranks find each other, on one machine or on many: with a deadline, and with the names of those that did not come."""

import datetime
import os
import socket
import sys
import time

import torch.distributed as dist


class RendezvousError(RuntimeError):
    """Not all ranks came. Exit code 1: nothing that was typed need be wrong."""


def join_process_group(
    backend: str, minutes: float, timeout: datetime.timedelta, stop=None
) -> None:
    """Makes the process group of all ranks, who have `minutes` to come (machines start at different times). timeout: of a later collective;
    stop: a StopRequest, at which the waiting ends.

    torch's own rendezvous waits in silence and ends with "timed out"; here every rank leaves its name where all can read it."""
    rank, world_size, started = (
        int(os.environ["RANK"]),
        int(os.environ["WORLD_SIZE"]),
        time.monotonic(),
    )
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    leads = (
        rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    )  # torchrun's agent keeps the list itself
    try:
        store = dist.TCPStore(
            host, port, None, leads, datetime.timedelta(minutes=minutes), wait_for_workers=False
        )
        missing, said = list(range(world_size)), False
        store.set(f"joined/{rank}", backend)
        while missing := [r for r in missing if not store.check([f"joined/{r}"])]:
            waited, names = (
                time.monotonic() - started,
                f"rank {', '.join(map(str, missing))} of {world_size}",
            )
            if stop and stop.reason not in (
                None,
                "run.max_hours",
            ):  # the time limit counts at a step's end
                raise RendezvousError(
                    f"rank {rank}: asked to stop ({stop.reason}) while it waited for {names}"
                )
            if waited > 60 * minutes:
                raise RendezvousError(
                    f"{names} did not come within run.rendezvous_timeout_minutes={minutes:g}; are all machines started, with the same number "
                    "of ranks?"
                )
            if rank == 0 and waited > 20 and not said:
                said = True
                print(
                    f"waiting for {names}, up to run.rendezvous_timeout_minutes={minutes:g}",
                    file=sys.stderr,
                    flush=True,
                )
            time.sleep(0.2)
        if backend != (
            theirs := store.get("joined/0").decode()
        ):  # else each side would wait for the other's first collective
            raise RendezvousError(
                f"rank {rank} on {socket.gethostname()} would use {backend}, and rank 0 {theirs}: does nvidia-smi find the GPUs of both?"
            )
    except dist.DistError as error:  # rank 0's machine does not answer
        raise RendezvousError(
            f"rank {rank}: {host}:{port} (MASTER_ADDR, MASTER_PORT) gave no answer within run.rendezvous_timeout_minutes={minutes:g}; is rank 0 "
            f"started, and the port open? ({str(error).strip().splitlines()[0][:100]})"
        ) from error
    store.set_timeout(timeout)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("loop", store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
