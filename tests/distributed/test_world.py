"""Ranks: what they tell each other, and how they begin."""

import contextlib
import datetime
import itertools
import os
import random
import socket
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import free_port, run_ok

from loop.config.schema import ConfigError, RunConfig
from loop.distributed import hosts, rendezvous, world
from loop.distributed.rendezvous import RendezvousError, listen_here_alone
from loop.distributed.seeding import seed_everything
from loop.distributed.world import SINGLE_PROCESS, read_rank_environment

RUN = RunConfig(rendezvous_timeout_minutes=7, stall_timeout_minutes=4)


COLLECTIVES = """
import torch.distributed as dist
from loop.distributed.world import init_distributed

ranks = init_distributed()
values = [None, "a", {"Ä€": [1.5, float("nan")] * 40}]
gathered = ranks.all_gather_json(values[ranks.rank])
assert gathered[:2] == values[:2] and str(gathered[2]) == str(values[2]), gathered
assert ranks.any(ranks.rank == 2) and not ranks.any(False)
assert ranks.all(True) and not ranks.all(ranks.rank == 2)
assert ranks.sum_scalars(ranks.rank, 1) == [3.0, 3.0]
dist.barrier()
dist.destroy_process_group()
print("agreed")
"""


def test_every_rank_gets_what_every_rank_says():
    """Values of unequal length, of JSON's types, NaN and other alphabets included.

    Nothing is pickled on the way.
    """
    assert "agreed" in run_ok(3, "-c", COLLECTIVES)


def test_what_a_stranger_sends_to_the_meeting_point_is_ignored():
    """It listens on the loopback alone. Strangers send garbage before a rank comes, and stay."""
    port = free_port()
    descriptor = listen_here_alone(port)
    assert socket.socket(fileno=os.dup(descriptor)).getsockname()[0] == "127.0.0.1"
    minute = datetime.timedelta(minutes=1)
    server = dist.TCPStore(
        "127.0.0.1", port, None, True, minute, wait_for_workers=False, master_listen_fd=descriptor
    )
    strangers = []
    for garbage in (b"", b"GET / HTTP/1.1\r\n\r\n", bytes(range(256)) * 400, b"\xff" * 9):
        strangers.append(socket.create_connection(("127.0.0.1", port)))
        with contextlib.suppress(ConnectionError):
            strangers[-1].sendall(garbage)
    client = dist.TCPStore("127.0.0.1", port, None, False, minute, wait_for_workers=False)
    client.set("joined/1", "gloo")
    assert server.get("joined/1") == b"gloo"
    with pytest.raises(RendezvousError, match=f"MASTER_PORT={port}: Address already in use"):
        listen_here_alone(port)
    for stranger in strangers:
        stranger.close()


def test_rank_0_says_once_whom_it_waits_for_and_names_who_never_comes(monkeypatch, capsys):
    clock = itertools.count(0, 5)  # five seconds a look
    monkeypatch.setattr(rendezvous.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(rendezvous.time, "sleep", lambda seconds: None)
    for rank, printed in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "3")
        store = dist.HashStore()
        store.set(f"joined/{rank}", "gloo")
        with pytest.raises(RendezvousError, match="did not come within run.rendezvous_timeout_min"):
            rendezvous._wait_for_all(store, next(clock), 2, None)
        said = capsys.readouterr().err
        assert said.count("waiting for rank 1, 2 of 3, up to run.rendezvous_") == printed
        assert (said != "") == bool(printed)


def test_ranks_of_one_machine_meet_on_its_loopback_and_by_one_backend(monkeypatch):
    """A store that hears the network is for several machines; another backend is refused."""
    store, listening = dist.HashStore(), []

    def meet(*args, master_listen_fd, **options) -> dist.HashStore:
        listening.append(master_listen_fd)
        return store

    monkeypatch.setattr(rendezvous.dist, "TCPStore", meet)
    monkeypatch.setattr(rendezvous.dist, "init_process_group", lambda *args, **options: None)
    monkeypatch.setattr(rendezvous, "listen_here_alone", lambda port: port)
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "29999"}.items():
        monkeypatch.setenv(name, value)
    store.set("joined/1", "nccl")
    for host in ("127.0.0.1", "localhost", "10.0.0.1"):
        monkeypatch.setenv("MASTER_ADDR", host)
        rendezvous.join_process_group("nccl", 1, datetime.timedelta(minutes=1))
    assert listening == [29999, 29999, None]
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(RendezvousError, match="would use gloo, and rank 0 nccl"):
        rendezvous.join_process_group("gloo", 1, datetime.timedelta(minutes=1))


# With `stop`, as the training loop has it: the watchdog is to speak before a collective ends.
@pytest.mark.parametrize(
    ("arguments", "minutes"),
    [
        ({}, (10, 30)),
        ({"run": RUN}, (7, 30)),
        ({"run": RUN, "stop": SimpleNamespace(reason=None)}, (7, 12)),
    ],
)
def test_how_long_ranks_and_collectives_wait(arguments, minutes, monkeypatch):
    joined = []
    monkeypatch.setattr(world, "join_process_group", lambda *args: joined.append(args))
    monkeypatch.setattr(world.deepspeed, "init_distributed", lambda **_: None)
    monkeypatch.setattr(world, "_terminate_with_parent", lambda: None)
    monkeypatch.setattr(world, "on_gpu", lambda: False)
    for name in world.SINGLE_PROCESS:  # what it sets is gone after the test
        monkeypatch.setenv(name, world.SINGLE_PROCESS[name])
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "")  # put back after the test
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    world.init_distributed(**arguments)
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "128"  # 1,024 shapes take up to a GiB
    ((backend, rendezvous, timeout, stop),) = joined
    assert (backend, stop) == ("gloo", arguments.get("stop"))
    assert (rendezvous, timeout.total_seconds() / 60) == minutes


@pytest.mark.parametrize("seed", [0, 2**40])
def test_seeding_repeats_every_generator(seed):
    draws = []
    for _ in range(2):
        seed_everything(seed)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]


@pytest.mark.parametrize(
    "wrong",
    [
        {"RANK": "abc"},
        {"RANK": "5", "WORLD_SIZE": "2"},
        {"WORLD_SIZE": "0"},
        {"LOCAL_RANK": "-1"},
        {"MASTER_PORT": "70000"},
        {"MASTER_ADDR": "no machine"},
        {"MASTER_ADDR": "x/../y"},
        {"GLOO_SOCKET_IFNAME": "nope"},
        {"GLOO_SOCKET_IFNAME": "lo,nope"},
        {"NCCL_SOCKET_IFNAME": "nope"},
        {"NCCL_SOCKET_IFNAME": "=nope"},
    ],
)
def test_what_can_be_no_rank_is_refused_by_name(monkeypatch, wrong):
    for name in SINGLE_PROCESS:
        monkeypatch.setenv(name, wrong.get(name, ""))
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, wrong.get(name, ""))
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        read_rank_environment()


@pytest.mark.parametrize("names", ["", "lo", "l", "^lo", "^nope", "=lo", "nope,lo", "lo:2"])
def test_interfaces_are_named_as_nccl_reads_them(monkeypatch, names):
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0")])
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", names)
    for address in ("", "127.0.0.1", "fe80::1%eth0", "node-1.cluster.local", "[::1]"):
        monkeypatch.setenv("MASTER_ADDR", address)
        hosts.check_network_names()
