#!/usr/bin/env bash
''':' # Bash reads a no-op, Python a string that ends below the Bash part. So `./launch.sh` is a shell script, while for
# `deepspeed launch.sh key=value`, where Python runs this file on every rank, it is `python -m loop.train key=value`.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
py=${LOOP_PYTHON:-$here/.venv/bin/python} base=${PYTHON:-python3} stamp=$here/.venv/launch.stamp
commands="train evaluate generate merge audit preview plan board profile check bench break test setup help"
help="usage: ./launch.sh [COMMAND] [--config FILE] [key=value ...]         (the first use also sets up .venv, once)
  train      fine-tune (the default command)       preview    show the exact tokens that are trained on
  evaluate   score a trained adapter, its notes    plan       the run before its first step: steps, tokens, lr
  generate   write the notes of dialogues          check      what this machine can run, how right and fast
  merge      fold an adapter into its base model   bench      tokens a second, alone or beside peers (--help)
  audit      is the adapter what was trained?      test       run the tests; arguments go to pytest
  board      TensorBoard on runs/, or on a folder  profile    where a step's time goes: trace, table
  break      what a classic mistake does to the curves, beside the right run's; without a name it lists them
  setup      only set up; --flash-attn-4 also gets the attention for Hopper and newer, --flash-attn builds the one before (needs nvcc)
train, evaluate and profile run a rank per GPU, or 2 ranks on the CPU, and take --gpus N (per machine) and --hostfile FILE
(the machines of a cluster, as DeepSpeed wants them). Ctrl-C or SIGTERM: the ranks save and end; once more: they end at once.
plan --gpus N --gpu-memory G: whether it fits N GPUs of G GiB, component by component, and what would make it fit.
evaluate --canaries N: what a run remembers of single (made-up) patients; trains on a copy of the data for it.
train --verify-resume: shows on a few steps that a run which is broken off and goes on is the unbroken one, bit for bit.
environment: PYTHON (makes .venv), LOOP_PYTHON (has the packages: no .venv), LOOP_GRACE_SECONDS (longest stop; 120),
             MASTER_PORT, CUDA_VISIBLE_DEVICES, OMP_NUM_THREADS"
die() { echo "launch.sh: $*" >&2; exit 2; }

# The stamp is a copy of what was installed, so a change of the pins or of Python repeats the set-up, and nothing else.
wanted() { "$py" --version && cat "$here/constraints.txt"; }
is_set_up() { [[ ${LOOP_PYTHON:-} ]] || [[ -f $stamp && $(<"$stamp") == "$(wanted 2>&1)" ]]; }
pip_install() { "$py" -m pip install -qq --disable-pip-version-check "$@"; }
install() { pip_install -c "$here/constraints.txt" "$@"; }
setup() {
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
    die "needs Python 3.10 or newer, but $base is: $("$base" --version 2>&1 || true); name another with PYTHON=..."
  flock 9 2>/dev/null || true; if is_set_up; then return; fi # a second first run waits here, and finds the work done
  # A set-up that was cut off can leave a package half unpacked, which pip would take for installed: begin again.
  if [[ -f $stamp && $(<"$stamp") == unfinished ]]; then rm -rf "$here/.venv"; fi
  mkdir -p "$here/.venv" && echo unfinished >"$stamp"
  echo "setting up $here/.venv (once; some minutes)"
  [[ -x $py ]] || "$base" -m venv "$here/.venv"
  # In this order, as the build of DeepSpeed imports PyTorch; its kernels are built when they are first used, not now.
  echo "installing PyTorch ... (1/3)"; install torch setuptools wheel ninja
  echo "installing DeepSpeed ... (2/3)"; DS_BUILD_OPS=0 install --no-build-isolation deepspeed
  echo "installing the rest ... (3/3)"; install -r "$here/constraints.txt"
  wanted >"$stamp"
} 9>"$here/.venv.lock"

command=train
case ${1:-} in
  -h | --help | help) echo "$help"; exit ;;
  "" | -* | *=*) ;;
  *) [[ " $commands " == *" $1 "* ]] || die "no command '$1'; there are: $commands"; command=$1; shift ;;
esac
is_set_up || setup
PATH=$(dirname "$(command -v "$py")"):$PATH # DeepSpeed looks for ninja there
export PATH PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-true}"
gpus="" # the numbers of the GPUs to use; if there are none, DeepSpeed is told so, or it would look and warn
if [[ ${DS_ACCELERATOR:-cuda} == cuda ]] && count=$(nvidia-smi -L 2>/dev/null | grep -c "^GPU "); then
  gpus=${CUDA_VISIBLE_DEVICES-$(seq -s, 0 $((count - 1)))}
fi
if [[ -z $gpus || $gpus == -1 ]]; then gpus="" && export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"; fi
case $command in
  train | evaluate | profile) if [[ $command == train && " $* " == *" --verify-resume "* ]]; then exec "$py" -u -m loop.verify "$@"; fi ;;
  check) exec "$py" -u -m kernels_check "$@" ;;
  bench) exec "$py" -u "$here/tests/bench" "$@" ;;
  break) exec "$py" -u "$here/tests/broken" "$@" ;;
  test) cd "$here" && exec "$py" -m pytest -q "$@" ;;
  setup) case "$*" in
    "") echo "set up: $("$py" --version), $py" ;;
    --flash-attn-4) pip_install 'flash-attn-4[cu13]==4.0.0b36' ;; # wheels; its kernels are compiled when they are first used
    --flash-attn) command -v nvcc >/dev/null || die "flash-attn is CUDA code: to build it, nvcc (the CUDA toolkit) must be on PATH"
      echo "building flash-attn ... (up to an hour)" # 4 compilers at a time, as each can take more than 8 GiB
      MAX_JOBS=${MAX_JOBS:-4} pip_install --no-build-isolation flash-attn ;;
    *) die "setup takes --flash-attn-4 or --flash-attn, not: $*" ;;
    esac; exit ;;
  *) exec "$py" -u -m "loop.$command" "$@" ;;
esac

ranks="" hostfile=/dev/null args=() # not DeepSpeed's default, /job/hostfile, if there should be one
while (($#)); do case $1 in
  --gpus=*) ranks=${1#*=} ;;
  --hostfile=*) hostfile=${1#*=}; [[ -f $hostfile ]] || die "--hostfile: there is no file '$hostfile'" ;;
  --gpus | --hostfile) (($# > 1)) || die "$1 needs a value"; set -- "" "$1=$2" "${@:3}" ;;
  *) args+=("$1") ;;
esac; shift; done
[[ -z $ranks || $ranks =~ ^[1-9][0-9]*$ ]] || die "--gpus takes a number from 1 upwards, not '$ranks'"
if [[ $hostfile != /dev/null ]]; then
  where=(${ranks:+--num_gpus "$ranks"})
elif [[ $gpus ]]; then # by number: told only how many, DeepSpeed takes GPU 0 and up, whatever CUDA_VISIBLE_DEVICES says
  [[ $gpus != *[!0-9,]* ]] || die "CUDA_VISIBLE_DEVICES must hold numbers such as 0,1, not '$gpus'"
  IFS=, read -ra ids <<<"$gpus"
  ((${ranks:=${#ids[@]}} <= ${#ids[@]})) || die "--gpus $ranks is more than the ${#ids[@]} that are here: $gpus"
  where=(--include "localhost:$(IFS=,; echo "${ids[*]:0:ranks}")")
else
  where=(--num_accelerators "${ranks:=2}")
fi
free_port='import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])' # two runs can coexist
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(($(nproc) > ranks ? $(nproc) / ${ranks:-1} : 1))}"
unset CUDA_VISIBLE_DEVICES # DeepSpeed sets it for the ranks

# This shell starts DeepSpeed's runner, that a launcher, that the ranks. A SIGTERM would end the runner alone, and the
# launcher signals ranks one by one. So they get a group that the terminal does not signal, and each rank a request to
# stop once, as SIGTERM (it shows no traceback). With no ranks here (too early, or behind pdsh) the runner gets it.
signal_ranks='import psutil, sys
runner = psutil.Process(int(sys.argv[1]))
ranks = [rank for child in runner.children() if child.name() != "pdsh" for rank in child.children()]
for process in ranks or [runner]: process.terminate()'
stop() {
  trap 'deadline=0' INT TERM HUP USR1 # a second request does not wait
  deadline=$((SECONDS + ${LOOP_GRACE_SECONDS:-120}))
  echo "launch.sh: stopping, the ranks save first (once more: stop at once)" >&2 || true
  "$py" -c "$signal_ranks" "$job" 2>/dev/null || true
}
export LOOP_LAUNCHER_PID=$$ # for the ranks to watch: if this shell is killed, nobody is left to tell them
port=${MASTER_PORT:-$("$py" -c "$free_port")}
setsid "$py" -m deepspeed.launcher.runner --log_level critical --hostfile "$hostfile" --master_port "$port" \
  "${where[@]}" --no_local_rank --module "loop.$command" ${args[@]+"${args[@]}"} & job=$! deadline=""
trap stop INT TERM HUP USR1
while kill -0 "$job" 2>/dev/null; do
  if [[ $deadline ]] && ((SECONDS >= deadline)); then kill -KILL -- "-$job"; fi
  sleep 1 & wait -n "$job" $! 2>/dev/null || true
done
wait "$job" 2>/dev/null && code=0 || code=$?
kill -KILL -- "-$job" 2>/dev/null || true # whatever the ranks left behind
if ((code > 192)); then # a rank that died by signal N: the launcher says 256 - N, a shell says 128 + N
  code=$((384 - code)) && echo "launch.sh: signal $((code - 128)) ended a rank (9 often means: out of memory)" >&2
fi
exit "$code"
: '''
import runpy, sys
sys.argv[1:] = [arg for arg in sys.argv[1:] if not arg.startswith("--local_rank=")] # DeepSpeed adds it
runpy.run_module("loop.train", run_name="__main__", alter_sys=True)
# ' ends the word that Bash began at the three quotes, so that linters and editors see a whole script
