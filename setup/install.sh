# What `./launch.sh setup` does. launch.sh reads this file; it sets here, py, base, stamp and kit.
#
# packages.txt locks every package with the hashes of its files, made by uv (CONTRIBUTING.md).
# torch-cpu.txt does so for PyTorch's build for CPUs. pip compares the hash of each file.

cuda="torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z-]+" # PyTorch's build for GPUs, what only that needs
built="deepspeed|rouge-score"                      # come as source, and are built here

# The stamp tells what was installed. So a change of the locks or of Python repeats the set-up, and
# nothing else does.
wanted() { "$py" --version && (cd "$here" && sha256sum constraints.txt setup/*.txt); }
is_set_up() { [[ ${LOOP_PYTHON:-} ]] || [[ -f $stamp && $(<"$stamp") == "$(wanted 2>&1)" ]]; }

setup() {
  need_python "$base"
  flock 9 2>/dev/null || true # a second first run waits here, and finds the work done
  if is_set_up; then return; fi
  # An interrupted set-up can leave a package half unpacked, which pip would take for installed.
  if [[ -f $stamp && $(<"$stamp") == unfinished ]]; then rm -rf "$here/.venv"; fi
  mkdir -p "$here/.venv"
  echo unfinished >"$stamp"
  echo "setting up $here/.venv (once; some minutes)"
  [[ -x $py ]] || "$base" -m venv "$here/.venv"
  if [[ $kit ]]; then install_kit; else install_packages; fi
  wanted >"$stamp"
} 9>"$here/.venv.lock"

install_packages() {
  local build
  build=$(torch_build)
  echo "installing PyTorch, $(in_words "$build") ... (1/3)"
  pip_torch "$build" install
  echo "installing the rest ... (2/3)"
  locked not "$cuda|$built" | pip_locked install
  # Last, as that imports PyTorch. Its kernels are built at first use.
  echo "building DeepSpeed ... (3/3)"
  locked of "$built" | DS_BUILD_OPS=0 pip_locked install --no-build-isolation
}

# --- pip -----------------------------------------------------------------------------------------

pip_install() { "$py" -m pip install -q --disable-pip-version-check "$@"; }

# `locked of NAMES`: the part of the lock with these packages; `locked not NAMES`: all the others.
locked() {
  awk -v names="^($2)==" -v which="$1" \
    '/^[a-z]/ { of = $0 ~ names } (of + 0) == (which == "of")' "$here/setup/packages.txt"
}

# `pip install` or `pip wheel` of a part of the lock, which it reads from its input. What pip says
# goes to a file, as it needs ten lines to say that a hash differs.
pip_locked() {
  local log=$here/.venv/pip.log wrong
  "$py" -m pip "$1" -q --disable-pip-version-check --require-hashes --no-deps "${@:2}" \
    -r <(cat) >"$log" 2>&1 && return
  wrong=$(sed -n 's/^    \([^ ]*==[^ ]*\) from .*/\1/p' "$log" | paste -sd " ")
  [[ ! $wrong ]] || die "$wrong: not the file that is locked in setup/, as its hash differs;" \
    "look where pip takes it from ($log has its words)"
  die "$(grep -m 1 ERROR "$log" || tail -n 1 "$log") ($log has all of pip's words)"
}

# --- PyTorch, in several builds ------------------------------------------------------------------

count_gpus() { nvidia-smi -L 2>/dev/null | grep -c "^GPU "; } # fails where there is none
reachable() {
  "$py" -c 'import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=8)' "$1" 2>/dev/null
}

# gpu; cpu, a tenth of the download, where no GPU is; or the index that LOOP_TORCH_INDEX names.
torch_build() {
  if [[ -n ${LOOP_TORCH_INDEX+set} ]]; then
    echo "${LOOP_TORCH_INDEX:-gpu}"
  elif count_gpus >/dev/null; then
    echo gpu
  elif [[ ! $(python_and_processor) =~ ^3\.1[123]\ x86_64$ ]]; then
    echo gpu # torch-cpu.txt has no hash for this one
  else
    echo cpu
  fi
}

in_words() { case $1 in [cg]pu) echo "its build for ${1^^}s" ;; *) echo "of $1" ;; esac; }

# `pip_torch BUILD install` or `pip_torch BUILD wheel --wheel-dir FOLDER`
pip_torch() {
  local build=$1 cpu_index=https://download.pytorch.org/whl/cpu
  shift
  case $build in
    gpu) locked of "$cuda" | pip_locked "$@" ;;
    cpu)
      if reachable "$cpu_index/torch/"; then
        pip_locked "$@" --extra-index-url "$cpu_index" <"$here/setup/torch-cpu.txt"
      else # pip may know another place that has it; the build for GPUs runs on a CPU too
        (pip_locked "$@" <"$here/setup/torch-cpu.txt") 2>/dev/null || pip_torch gpu "$@"
      fi ;;
    *) pip_install -c "$here/constraints.txt" --extra-index-url "$build" torch ;; # no hashes
  esac
}

# --- a kit: all wheels of a set-up in a folder, for machines that reach no network ---------------

python_and_processor() {
  "$py" -c 'import platform; print(*platform.python_version_tuple()[:2], sep=".", end=" ")
print(platform.machine())'
}

make_kit() { # FOLDER [--gpu | --cpu]
  local folder=$1 build=${2-}
  build=${build#--}
  [[ ${build:=$(torch_build)} == [cg]pu ]] || die "a kit takes --gpu or --cpu, not: $build"
  mkdir -p "$folder"
  rm -f "$folder"/*.whl "$folder/SHA256SUMS"
  echo "making a kit in $folder: PyTorch, $(in_words "$build") ... (1/2)"
  pip_torch "$build" wheel --wheel-dir "$folder"
  echo "the rest ... (2/2)"
  locked not "$cuda" | DS_BUILD_OPS=0 pip_locked wheel --no-build-isolation --wheel-dir "$folder"
  python_and_processor >"$folder/for"
  cp "$here"/setup/*.txt "$folder"
  (cd "$folder" && sha256sum -- *.whl *.txt for >SHA256SUMS) # last: it says that the kit is whole
  echo "made. Where no network is: ./launch.sh setup --wheels FOLDER"
}

install_kit() {
  local damaged lock
  damaged=$(cd "$kit" && LC_ALL=C sha256sum --check --quiet SHA256SUMS 2>/dev/null |
    cut -d: -f1 | paste -sd " ") || true
  [[ ! $damaged ]] || die "$kit: damaged or incomplete, copy it again: $damaged"
  [[ $(<"$kit/for") == "$(python_and_processor)" ]] ||
    die "$kit is for Python $(<"$kit/for"), but $py is $(python_and_processor);" \
      "name another with PYTHON=..."
  for lock in "$here"/setup/*.txt; do
    cmp -s "$lock" "$kit/${lock##*/}" || die "$kit has other packages than $lock: make a new one"
  done
  echo "installing from $kit ..."
  (cd "$kit" && sed -n 's/^[^ ]*  \(.*\.whl\)$/\1/p' SHA256SUMS | tr '\n' '\0' |
    xargs -0 "$py" -m pip install -q --disable-pip-version-check --no-index --no-deps)
}
