"""launch.sh with a toy in the place of train: what reaches the ranks, and what comes back."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import helpers
import psutil
import pytest
from helpers import LAUNCH_COMMANDS, communicate, ends_within, wait_until

from loop.config.schema import ConfigError
from loop.distributed import launcher
from loop.distributed.hosts import find_hosts, local_hosts, read_hostfile
from loop.distributed.launcher import StopSignals

ROOT = Path(__file__).resolve().parents[2]
# What the launcher is made of.
COPIED = (
    "config/cli.py",
    "config/device.py",
    "config/error_text.py",
    "config/lora_fields.py",
    "config/plain_yaml.py",
    "config/schema.py",
    "distributed/exit.py",
    "distributed/hosts.py",
    "distributed/launcher.py",
    "distributed/start_ranks.py",
)

# A rank that writes what happens to it into events.<rank>, and stops as the real ones do: after a
# signal, at a "step".
TOY = """
import os, signal, sys, time
args, rank = sys.argv[1:], os.environ.get("RANK", "none")
def note(text):
    with open(f"events.{rank}", "a") as file:
        file.write(text + "\\n")
signals = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: signals.append(number) or note(f"signal {number}"))
env = [os.environ.get(name, "") for name in ("WORLD_SIZE", "DS_ACCELERATOR", "OMP_NUM_THREADS")]
note("args " + " ".join(args) + "\\nenv " + " ".join(env))
if "fail=1" in args:
    while not (os.path.exists("events.0") and os.path.exists("events.1")):
        time.sleep(0.05)  # or the launcher could end the slower rank before it has written anything
    sys.stderr.write("toy: fail=1 is a mistake\\n")
    sys.exit(2)
while "wait=1" in args:
    time.sleep(0.05)
    if signals and "deaf=1" not in args:
        time.sleep(1)
        note("saved")
        break
"""


def make_clone(folder):
    """A folder with launch.sh and a toy package, as a user's clone."""
    loop = folder / "loop"
    for package in ("", "commands", "config", "distributed"):
        (loop / package).mkdir(parents=True)
        (loop / package / "__init__.py").touch()
    for name in ("launch.sh", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "setup", folder / "setup")
    for name in COPIED:
        shutil.copy(ROOT / "loop" / name, loop / name)
    (loop / "commands" / "train.py").write_text(TOY)
    return folder


@pytest.fixture
def clone(tmp_path):
    return make_clone(tmp_path / "clone")


@pytest.fixture
def two_clones(tmp_path):
    """For two runs at once, which saves time, and shows that they don't disturb each other."""
    return make_clone(tmp_path / "one"), make_clone(tmp_path / "two")


def start(clone, *args, **changes):
    env = os.environ | {"LOOP_PYTHON": sys.executable, "DS_ACCELERATOR": "cpu"} | changes
    env.pop("OMP_NUM_THREADS", None)
    env = {name: value for name, value in env.items() if value is not None}
    command = [str(clone / "launch.sh"), *args]
    return subprocess.Popen(
        command, cwd=clone, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def run(clone, *args, **env):
    process = start(clone, *args, **env)
    out, err = communicate(process, 60)
    return process.returncode, out, err


def events(clone, rank):
    path = clone / f"events.{rank}"
    return path.read_text().splitlines() if path.exists() else []


def living(clone):
    """The processes that run in this clone (each test has its own folder)."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            dead = process.status() == psutil.STATUS_ZOMBIE
            if process.cwd() == str(clone) and process.name() != "sleep" and not dead:
                found.append(process)
    return found


def wait_for_ranks(*clones, lines=2):
    wait_until(
        lambda: all(len(events(clone, rank)) >= lines for clone in clones for rank in (0, 1)), 40
    )


def test_help_names_every_command(clone):
    for word in ("help", "-h", "--help"):
        code, out, err = run(clone, word)
        assert (code, err) == (0, "")
        assert all(f"{command} " in out for command in LAUNCH_COMMANDS if command != "help")


@pytest.mark.parametrize(
    "args, says",
    [
        (["trian"], "'trian'"),
        (["setup", "now"], "now"),
        (["--gpus"], "--gpus"),
        (["train", "a=1", "--gpus", "none"], "'none'"),
        (["--hostfile=nowhere"], "nowhere"),
        (["--node-rank=0"], "--hostfile"),
        (["--hostfile="], "--hostfile"),
        (["--gpus="], "''"),
        (["--hostfile=launch.sh", "--node-rank="], "line 2"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(clone, args, says):
    code, out, err = run(clone, *args)
    assert (code, out) == (2, "")
    assert says in err and err.count("\n") == 1


def test_an_unknown_command_shows_the_list(clone):
    assert all(command in run(clone, "trian")[2] for command in LAUNCH_COMMANDS)


def test_flash_attention_needs_nvcc(clone):
    code, _, err = run(clone, "setup", "--flash-attn", PATH="/usr/bin:/bin")
    assert code == 2 and "nvcc" in err


def test_a_command_runs_once_and_gets_its_arguments_untouched(clone):
    (clone / "loop" / "commands" / "plan.py").write_text(TOY)
    assert run(clone, "plan", "--gpus", "8", "a=b c")[0] == 0
    assert events(clone, "none")[0] == "args --gpus 8 a=b c"


def test_board_runs_once_and_profile_on_the_ranks_of_train(clone):
    for name in ("board", "profile"):
        (clone / "loop" / "commands" / f"{name}.py").write_text(TOY)
    assert run(clone, "board", "my runs")[0] == 0 and events(clone, "none")[0] == "args my runs"
    done = run(clone, "profile", "--gpus=2", "lr=1")
    assert done[0] == 0, done
    assert [events(clone, rank)[0] for rank in (0, 1)] == ["args lr=1"] * 2


def test_without_a_command_it_trains_and_a_mistake_comes_out_as_one(clone):
    code, out, err = run(clone, "fail=1", "--gpus=2", "a=b c", "--config", "x.json")
    assert (code, out) == (2, "")
    assert set(err.splitlines()) == {"toy: fail=1 is a mistake"}
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    for rank in (0, 1):
        assert events(clone, rank)[:2] == [
            "args fail=1 a=b c --config x.json",
            f"env 2 cpu {threads}",
        ]
    assert not living(clone)


def test_a_signal_reaches_each_rank_once_and_they_end_well(two_clones):
    runs = [start(clone, "wait=1") for clone in two_clones]
    wait_for_ranks(*two_clones)
    for process, number in zip(runs, (signal.SIGINT, signal.SIGTERM)):
        process.send_signal(number)
    for process, clone in zip(runs, two_clones):
        _, err = communicate(process, 30)
        assert process.returncode == 0 and "Traceback" not in err
        for rank in (0, 1):
            assert events(clone, rank)[2:] == [f"signal {int(signal.SIGTERM)}", "saved"]
        assert not living(clone)


def test_a_signal_to_every_process_at_once_ends_well(clone):
    """As from SLURM: the parent of the ranks gets it as well, and waits for them."""
    process = start(clone, "wait=1")
    wait_for_ranks(clone)
    for each in living(clone):
        each.send_signal(signal.SIGTERM)
    communicate(process, 30)
    assert process.returncode == 0
    for rank in (0, 1):
        assert events(clone, rank)[-1] == "saved"
    assert not living(clone)


def test_ranks_that_do_not_listen_end_at_a_second_signal_or_after_the_grace_period(two_clones):
    runs = [
        start(clone, "wait=1", "deaf=1", LOOP_GRACE_SECONDS=grace)
        for clone, grace in zip(two_clones, ("600", "2"))
    ]
    wait_for_ranks(*two_clones)
    for process in runs:
        process.send_signal(signal.SIGTERM)
    wait_for_ranks(*two_clones, lines=3)
    time.sleep(1)
    runs[0].send_signal(signal.SIGINT)
    for process, clone in zip(runs, two_clones):
        communicate(process, 15)
        assert process.returncode == 128 + signal.SIGKILL
        assert not living(clone)


def test_when_a_rank_dies_the_others_end_too(clone):
    process = start(clone, "wait=1")
    wait_for_ranks(clone)
    next(p for p in living(clone) if "RANK" in p.environ()).kill()
    _, err = communicate(process, 30)
    assert process.returncode == 128 + signal.SIGKILL and "signal 9" in err
    assert not living(clone)


def test_a_signal_before_there_are_ranks_leaves_nothing(clone):
    process = start(clone, "wait=1")

    def launcher_has_a_child():
        launchers = [p for p in living(clone) if "loop.distributed.launcher" in p.cmdline()]
        return any(p.children() for p in launchers)

    wait_until(launcher_has_a_child, 40)
    process.send_signal(signal.SIGTERM)
    communicate(process, 10)
    # Ranks that were there in time have stopped as they do.
    saved = [events(clone, rank)[-1:] == ["saved"] for rank in (0, 1)]
    assert process.returncode == (0 if all(saved) else 128 + signal.SIGTERM)
    assert not living(clone)


@pytest.mark.parametrize(
    "visible, gpus, found",
    [
        ("0,1,2,3", None, [0, 1, 2, 3]),
        ("0,1,2,3", 2, [0, 1]),
        ("3,1,2", 2, [3, 1]),
        ("", None, [0, 1]),
        ("", 3, [0, 1, 2]),
        ("0,1", 5, "more than the 2"),
        ("GPU-1b2c", None, "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_ranks_go_to_the_gpus_that_may_be_used(visible, gpus, found):
    if isinstance(found, list):
        assert local_hosts(visible, gpus) == {"localhost": found}
    else:
        with pytest.raises(ConfigError, match=found):
            local_hosts(visible, gpus)


@pytest.mark.parametrize(
    "set_to, numbers", [(None, "0,1,2,3"), ("3,1", "3,1"), ("", ""), ("-1", "")]
)
def test_gpus_are_the_visible_ones_or_all(clone, set_to, numbers):
    scripts = {
        "python": 'echo "visible=$CUDA_VISIBLE_DEVICES $@"',
        "nvidia-smi": r'printf "GPU %d: H200\n" 0 1 2 3',
    }
    for name, body in scripts.items():
        (clone / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (clone / name).chmod(0o755)
    changes = {
        "LOOP_PYTHON": str(clone / "python"),
        "PATH": f"{clone}:/usr/bin:/bin",
        "DS_ACCELERATOR": None,
    }
    code, out, _ = run(clone, "lr=1", CUDA_VISIBLE_DEVICES=set_to, **changes)
    assert (code, out) == (0, f"visible={numbers} -u -m loop.distributed.launcher train lr=1\n")


def test_a_hostfile_names_machines_and_their_slots(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("# two machines\none slots=4\n\nme@two slots=2 # the small one\n")
    assert read_hostfile(hosts) == {"one": [0, 1, 2, 3], "me@two": [0, 1]}
    assert read_hostfile(hosts, 2) == {"one": [0, 1], "me@two": [0, 1]}
    for text, named in (
        ("one slots=4\ntwo slot=4", "line 2"),
        ("one", "line 1"),
        ("one slots=0", "line 1"),
        ("one slots=4\none slots=4", "line 2"),
        ("# none\n", "names no machine"),
        ("one slots=8\ntwo slots=2", "more than the slots of two"),
    ):
        hosts.write_text(text)
        with pytest.raises(ConfigError, match=named):
            read_hostfile(hosts, 4 if "more" in named else None)


def test_a_machine_takes_its_visible_gpus_and_wrong_options_are_named(tmp_path, monkeypatch):
    (tmp_path / "hosts").write_text("one slots=2\ntwo slots=2\n")
    hosts = str(tmp_path / "hosts")
    assert find_hosts(None, hosts, "1", "4,5,6") == {"one": [0, 1], "two": [4, 5]}
    assert find_hosts("1", hosts, "0", "3") == {"one": [3], "two": [0]}
    assert find_hosts(None, hosts, "0", "") == {"one": [0, 1], "two": [0, 1]}
    for options, words in (
        ((None, hosts, "0", "5"), "--gpus 2 is more than the 1"),
        ((None, hosts, "2", ""), "--node-rank '2'"),
        ((None, hosts, "", ""), "--node-rank ''"),
        ((None, str(tmp_path), "0", ""), "--hostfile"),
    ):
        with pytest.raises(ConfigError, match=words):
            find_hosts(*options)
    (tmp_path / "hosts").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not a text"):
        find_hosts(None, hosts, "0", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="no ssh"):
        find_hosts(None, hosts, None, "")


@pytest.mark.parametrize("setting", [{"LOOP_GRACE_SECONDS": "2m"}, {"MASTER_PORT": "abc"}])
def test_a_number_in_the_environment_is_one(clone, setting):
    (name,) = setting
    code, out, err = run(clone, "lr=1", **setting)
    assert (code, out) == (2, "") and f"{name}=" in err and err.count("\n") == 1


def test_under_nohup_the_end_of_the_terminal_is_no_request():
    before = {
        number: signal.getsignal(number)
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    }
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        requests = StopSignals(None)
        os.kill(os.getpid(), signal.SIGHUP)
        assert not requests.stop
        # One request may come twice at once.
        for after, killed in ((0, False), (0, False), (1.1, True)):
            requests.since -= after
            os.kill(os.getpid(), signal.SIGTERM)
            assert requests.stop and requests.kill is killed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# In the place of ssh: `ssh -o ... HOST COMMAND` runs the command here.
FAKE_SSH = """#!/usr/bin/env bash
while [[ $1 == -o ]]; do shift 2; done
[[ $1 != gone ]] || { echo "ssh: no route to $1" >&2; exit 255; }
exec bash -c "$2"
"""


@pytest.fixture
def cluster(clone):
    """Starts a command on two machines with a rank each: `cluster(*args)`."""
    (clone / "ssh").write_text(FAKE_SSH)
    (clone / "ssh").chmod(0o755)
    (clone / "hosts").write_text("one slots=1\ntwo slots=1\n")
    (clone / "lost").write_text("one slots=1\ngone slots=1\n")
    return lambda *args, **env: start(
        clone, *args, PATH=f"{clone}:{os.environ['PATH']}", MASTER_ADDR="127.0.0.1", **env
    )


def test_words_signals_and_mistakes_pass_between_machines(clone, cluster):
    """A run that is stopped, then one whose ranks find a mistake."""
    process = cluster("--hostfile", "hosts", "wait=1", "a='b c' $HOME; \"d", "--gpus=1")
    wait_for_ranks(clone)
    process.send_signal(signal.SIGINT)
    _, err = communicate(process, 30)
    assert process.returncode == 0 and err.count("stopping") == 1 and "Traceback" not in err
    for rank in (0, 1):
        args, env, *rest = events(clone, rank)
        assert args == "args wait=1 a='b c' $HOME; \"d" and env.startswith("env 2 ")
        assert rest == [f"signal {int(signal.SIGTERM)}", "saved"]
        (clone / f"events.{rank}").unlink()
    process = cluster("--hostfile=hosts", "fail=1")
    _, err = communicate(process, 30)
    assert process.returncode == 2 and "toy: fail=1 is a mistake" in err
    assert not living(clone)


def test_when_the_starter_is_killed_or_a_second_signal_comes_all_machines_end(clone, cluster):
    process = cluster("--hostfile", "hosts", "wait=1")
    wait_for_ranks(clone)
    process.kill()
    wait_until(lambda: not living(clone), 40)
    for rank in (0, 1):
        assert events(clone, rank)[2:] == [f"signal {int(signal.SIGTERM)}", "saved"]
        (clone / f"events.{rank}").unlink()
    process = cluster("--hostfile", "hosts", "wait=1", "deaf=1")
    wait_for_ranks(clone)
    process.send_signal(signal.SIGTERM)
    wait_for_ranks(clone, lines=3)
    time.sleep(1)  # sooner it would be the same request, come twice
    process.send_signal(signal.SIGTERM)
    communicate(process, 15)
    assert process.returncode == 128 + signal.SIGKILL and not living(clone)


@pytest.mark.slow
def test_a_machine_that_is_not_reached_ends_the_others(clone, cluster):
    process = cluster("--hostfile", "lost", "wait=1", "deaf=1")
    _, err = communicate(process, 90)
    assert process.returncode == 255 and "gone ended with 255" in err and not living(clone)


def test_python_reads_the_same_file_as_loop_train(clone):
    command = [sys.executable, "-W", "error", "launch.sh", "--local_rank=1", "a=b"]
    result = helpers.run(command, 30, cwd=clone)
    assert (result.returncode, result.stderr) == (0, "")
    assert [line for line in events(clone, "none") if line.startswith("args")] == ["args a=b"]


# A stand-in for Python that makes a "venv" holding itself and only notes what pip is asked for: the
# words, and the packages of a file that is the last word.
FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
  *platform*) echo "${FAKE_MACHINE:-3.12 x86_64}" ;;
  -c*) exit "${FAKE_OLD:-0}" ;;
  --version) echo "Python 3.99.0" ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && echo venv >>"$FAKE_LOG" ;;
  "-m pip "*)
    packages=$(grep -so '^[a-z][^=;]*==[^ ]*' "${!#}" | tr '\\n' ' ') || true
    echo "$* $packages" >>"$FAKE_LOG"
    sleep "${FAKE_SLEEP:-0}"
    [[ "$* $packages" != *"${FAKE_FAILS:-no such package}"* ]] ;;
esac
"""


@pytest.fixture
def new_clone(clone):
    python = clone / "fake_python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    log = clone / "pip.log"

    def set_up(**env):
        log.unlink(missing_ok=True)
        return start(clone, "setup", PYTHON=str(python), LOOP_PYTHON=None, FAKE_LOG=str(log), **env)

    def calls():
        """The last packages of each call, without their versions."""
        lines = log.read_text().splitlines() if log.exists() else []
        return [line.split()[-1].split("==")[0] for line in lines]

    return set_up, calls


ALL = ["venv", "torch", "yarl", "rouge-score"]


def test_set_up_installs_what_is_locked_and_only_once(clone, new_clone):
    set_up, calls = new_clone
    assert ends_within(set_up(), 10) == 0 and calls() == ALL
    _, *lines = (clone / "pip.log").read_text().splitlines()
    assert all("--require-hashes --no-deps" in line for line in lines)
    torch, rest, source = (dict.fromkeys(re.findall(r"(\S+)==", line)) for line in lines)
    assert [*torch] == ["torch"] and [*source] == ["deepspeed", "rouge-score"]
    locked = re.findall("^([a-z0-9-]+)==", (clone / "setup" / "packages.txt").read_text(), re.M)
    cuda = {name for name in locked if name.startswith(("nvidia-", "cuda-"))} | {"triton"}
    assert rest.keys() | torch.keys() | source.keys() | cuda == set(locked)
    assert len(cuda) > 10 and not cuda & rest.keys()
    assert ends_within(set_up(), 10) == 0 and calls() == []
    with open(clone / "setup" / "packages.txt", "a") as file:
        file.write("zipp==1 \\\n")
    assert ends_within(set_up(), 10) == 0 and calls() == ["torch", "zipp", "rouge-score"]


def test_torchs_build_for_cpus_is_taken_where_no_gpu_is(clone, new_clone):
    set_up, _ = new_clone
    (clone / "bin").mkdir()
    driver = clone / "bin" / "nvidia-smi"
    driver.write_text("#!/usr/bin/env bash\necho 'GPU 0: L4 (UUID: 1)'\n")
    driver.chmod(0o755)
    with_gpu = {"PATH": f"{driver.parent}:{os.environ['PATH']}"}
    without = {"PATH": "/usr/bin:/bin"}
    for env, says, call in (
        (without, "its build for CPUs", r"--extra-index-url \S+/cpu -r \S+ torch==\S+\+cpu$"),
        (without | {"FAKE_MACHINE": "3.10 x86_64"}, "for GPUs", "triton"),
        (without | {"FAKE_MACHINE": "3.12 aarch64"}, "for GPUs", "triton"),
        (
            with_gpu,
            "its build for GPUs",
            r"-r \S+ cuda-\S+ .*nvidia-\S+ .*torch==[\d.]+ triton==\S+$",
        ),
        (with_gpu | {"LOOP_TORCH_INDEX": "file:///x"}, "of file:///x", "-url file:///x torch$"),
        ({"LOOP_TORCH_INDEX": ""}, "its build for GPUs", "nvidia-"),
    ):
        shutil.rmtree(clone / ".venv", ignore_errors=True)
        out, _ = communicate(set_up(**env), 10)
        line = (clone / "pip.log").read_text().splitlines()[1].rstrip()
        assert says in out and re.search(call, line), (out, line)


def test_an_interrupted_set_up_is_repeated_from_the_start(new_clone):
    set_up, calls = new_clone
    assert ends_within(set_up(FAKE_FAILS="deepspeed"), 10) == 2 and calls() == ALL
    assert ends_within(set_up(), 10) == 0 and calls() == ALL


def test_two_first_runs_at_once_set_up_once(new_clone):
    set_up, calls = new_clone
    both = [set_up(FAKE_SLEEP="0.3"), set_up(FAKE_SLEEP="0.3")]
    assert [ends_within(process, 15) for process in both] == [0, 0] and calls() == ALL


def test_an_old_python_is_refused(new_clone):
    process = new_clone[0](FAKE_OLD="1")
    _, err = communicate(process, 10)
    assert process.returncode == 2 and "3.10" in err


def test_a_machine_that_starts_this_one_and_falls_silent_stops_it(monkeypatch):
    monkeypatch.setattr(launcher.signal, "signal", lambda *args: None)
    monkeypatch.setattr(launcher, "SILENCE_SECONDS", 0.1)
    read, write = os.pipe()
    with open(write, "wb", buffering=0) as starter, open(read, "rb", buffering=0) as commands:
        starter.write(b"alive\n")
        requests = StopSignals(commands)
        wait_until(lambda: requests.stop, 10)
        assert not requests.kill


@pytest.mark.parametrize("threads", [None, "7"])
def test_ranks_share_the_cores_unless_threads_are_set(monkeypatch, threads):
    environments = []

    def start(*_, env, **__):
        environments.append(env)

    monkeypatch.setattr(launcher.subprocess, "Popen", start)
    monkeypatch.setattr(launcher.os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if threads:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    launcher.LocalNode({"one": [0, 1]}, 0, "127.0.0.1", 29500, ["loop.commands.train"])
    assert environments[0]["OMP_NUM_THREADS"] == (threads or "4")


def test_other_machines_get_the_networks_settings_and_no_secret(monkeypatch):
    commands = []

    class Started:
        stdin = SimpleNamespace(write=lambda data: None, flush=lambda: None)

        def __init__(self, command, **_):
            commands.append(command)

    for name in ("GLOO_SOCKET_IFNAME", "NCCL_DEBUG", "HF_HOME", "LOOP_GRACE_SECONDS"):
        monkeypatch.setenv(name, f"of-{name}")
    for name in ("HF_TOKEN", "HF_HUB_KEY", "LOOP_PASSWORD", "NCCL_SECRET", "SSH_AUTH_SOCK"):
        monkeypatch.setenv(name, f"secret-{name}")
    monkeypatch.setattr(launcher.subprocess, "Popen", Started)
    launcher.RemoteNode("two", {"one": [0], "two": [0]}, 1, 29500, ["train", "lr=1"])
    (command,) = commands
    assert command[0] == "ssh" and "two" in command
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_DEBUG", "HF_HOME", "LOOP_GRACE_SECONDS"):
        assert f"{name}=of-{name}" in command[-1]
    assert "MASTER_PORT=29500" in command[-1] and "secret" not in command[-1]
