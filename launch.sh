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
train, evaluate and profile run a rank per GPU, or 2 ranks on the CPU, and take --gpus N (per machine) and --hostfile FILE (a line
a machine: NAME slots=N; each is reached over ssh, or starts itself with --node-rank K, its line from 0 upwards).
Ctrl-C or SIGTERM: the ranks save and end, on all machines; once more: they end at once.
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
  train | evaluate | profile) if [[ $command == train && " $* " == *" --verify-resume "* ]]; then exec "$py" -u -m loop.commands.verify_resume "$@"; fi ;;
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
  *) exec "$py" -u -m "loop.commands.$command" "$@" ;;
esac

# From here on it is Python: it starts the ranks, passes signals on to them, and ends as they end.
CUDA_VISIBLE_DEVICES=$gpus exec "$py" -u -m loop.distributed.launcher "$command" "$@"
: '''
import runpy, sys
sys.argv[1:] = [arg for arg in sys.argv[1:] if not arg.startswith("--local_rank=")] # DeepSpeed adds it
runpy.run_module("loop.commands.train", run_name="__main__", alter_sys=True)
# ' ends the word that Bash began at the three quotes, so that linters and editors see a whole script
