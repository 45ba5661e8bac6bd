#!/usr/bin/env bash
# Runs the worker on this machine: the Python environment it needs, torch in the build that fits,
# the worker itself. Sourced by manage-bark-worker.sh when `local` is called. Knows no Vast.
#
# Sections: constants and help; adapters; the child; the virtual environment; the gpu and torch;
#   local
# Call vastai: none
# Call curl: none
# Change what is billed: none
#
# shellcheck source=manage-bark-worker.sh
if [[ -z "${PROGRAM:-}" ]]; then source "${BASH_SOURCE[0]%/*}/../manage-bark-worker.sh"; fi

# -----------------------------------------------------------------------------
# Constants and help

readonly WORKER="$ROOT/bark-worker.py"
readonly BUILTIN_VOICE="$ROOT/builtin-voice"
readonly VENV_PYTHON="$VENV/bin/python"
readonly VENV_MARK="$VENV/made-by-$PROGRAM"    # in a .venv that this script made, and may remove
readonly TORCH_WHEELS='https://download.pytorch.org/whl'    # has an index for each build of torch
readonly REACH_SECONDS=10          # that pip may take to find what is there
readonly RUN_DIR="$VENV/run-$$"    # what the worker's log told, while it runs
readonly END_SECONDS=15            # the worker may finish its work for 10 s after SIGTERM
readonly SILENT_SECONDS=60         # without an answer from /health the worker counts as hung

readonly "USAGE_local=usage: $PROGRAM local [--model ID] [--listen NAME] [--verbose]
       $PROGRAM local --clean [--yes]

Makes .venv beside this script, installs the worker's part of requirements.txt into it when that
changed, starts bark-worker.py and says how to call it. Ctrl-C ends it.

  --model ID     hub id or folder of the model (the same as BARK_MODEL=ID); without one,
                 suno/bark on an NVIDIA GPU, else the small builtin-voice
  --listen NAME  hear what was spoken, and speak again what has wrong words (the same as
                 BARK_LISTEN=NAME): tiny, base, small, medium, each also as tiny.en for English
                 alone, large-v3, a hub id or folder of a Whisper; off unless said. Installs the
                 listening part of requirements.txt, too
  --verbose      show all that pip and the worker say
  --clean        remove the .venv that this made, after asking; models are not in it
  --yes          do not ask, with --clean

torch comes in the build that fits: for the CPU without a GPU, else for CUDA as the driver has it.
pip's own settings (PIP_INDEX_URL, pip.conf and so on) go first, then PyTorch's index.

The environment goes to the worker: PORT, HOST, BARK_VOICE, BARK_API_KEY and the others that
bark-worker.py --help lists; only HOST is 127.0.0.1 if unset, so that nobody else can call it.
BARK_DEVICE=cpu leaves the GPU alone."

verbose=''      # yes: pip and the worker may say all they have to say

# -----------------------------------------------------------------------------
# Adapters: the only functions that call Python, nvidia-smi or the worker

# usage: python_is_new_enough PYTHON    (numpy, scipy and transformers all ask for 3.11)
python_is_new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

python_version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

# Prints one line, STATUS DETAIL, of the worker at address $1; fails if it does not answer. With
# Python and not as `health_of`: here is no need of curl and jq, on a rented machine none of Python.
worker_health() {
  "$VENV_PYTHON" -I -S - "$1" <<'PYTHON' 2>/dev/null
import http.client, json, sys
connection = http.client.HTTPConnection(sys.argv[1].partition("//")[2], timeout=5)
connection.request("GET", "/health")
health = json.load(connection.getresponse())
detail = " ".join(str(health.get("error", "")).split())
progress = health.get("progress")
if progress and progress.get("bytes_total"):
    done, total = progress["bytes_done"], progress["bytes_total"]
    detail = f"{100 * done // total} % of {total / 1e9:.1f} GB"
print(health["status"], detail)
PYTHON
}

# Prints USABLE|VERSION|CUDA|REASON: whether torch really computes on the GPU (yes, no), its
# version, the CUDA it was built for (none: a CPU build), and what stood in the way.
torch_report() {
  "$VENV_PYTHON" - <<'PYTHON'
import warnings
import torch
usable, reason = False, ""
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    try:  # is_available() is also true for GPUs that this build has no kernels for
        usable = torch.cuda.is_available() and torch.ones(1, device="cuda").add(1).item() == 2
    except RuntimeError as error:
        reason = str(error)
if caught and not reason:
    reason = str(caught[0].message)
reason = " ".join(reason.split()).replace("|", "/")
print("yes" if usable else "no", torch.__version__, torch.version.cuda or "none", reason, sep="|")
PYTHON
}

# Prints the newest CUDA that the NVIDIA driver supports, as 12.4; nothing if it cannot be told.
driver_cuda() {
  local table pattern='CUDA( UMD)? Version: *([0-9]+[.][0-9]+)'
  table="$(nvidia-smi 2>/dev/null)" || return 0
  if [[ "$table" =~ $pattern ]]; then printf '%s\n' "${BASH_REMATCH[2]}"; fi
}

# Prints why this machine counts as one without a GPU; nothing if it has one.
why_no_gpu() {
  local list
  case "${BARK_DEVICE:-}" in
    cpu) printf 'BARK_DEVICE=cpu leaves the GPU alone\n'; return 0 ;;
    cuda*) return 0 ;;
  esac
  if [[ "${CUDA_VISIBLE_DEVICES-0}" == '' || "${CUDA_VISIBLE_DEVICES-0}" == '-1' ]]; then
    printf 'CUDA_VISIBLE_DEVICES hides every GPU\n'
  elif ! command -v nvidia-smi >/dev/null 2>&1; then
    printf 'no NVIDIA GPU here\n'
  elif ! list="$(nvidia-smi -L 2>&1)" || [[ "$list" != *'GPU '* ]]; then
    printf 'no NVIDIA GPU that works here (nvidia-smi: %s)\n' "${list%%$'\n'*}"
  fi
}

# -----------------------------------------------------------------------------
# The child: the one process that must not outlive this script

child_pid=''

# usage: start_child COMMAND...
# In a process group of its own, so that the terminal's Ctrl-C reaches it once: through `finish`.
start_child() {
  set -m
  "$@" </dev/null >&2 &
  child_pid=$!
  set +m
}

signal_child() { kill "-$1" -- "-$child_pid" 2>/dev/null || true; }

child_lives() { [[ -n "$child_pid" ]] && kill -0 "$child_pid" 2>/dev/null; }

child_is_gone() { ! child_lives; }

# Asks the child to end, makes it after END_SECONDS, and returns its exit status.
end_child() {
  local status=0
  signal_child TERM
  until_true "$END_SECONDS" 0 child_is_gone || true
  signal_child KILL
  wait "$child_pid" 2>/dev/null || status=$?
  return "$status"
}

finish_child() {
  if child_lives; then
    trap 'signal_child KILL' INT TERM
    if [[ -d "$RUN_DIR" ]]; then
      say 'stopping: running requests may finish for 10 s (Ctrl-C again: at once)'
    fi
    end_child || true
    if [[ -d "$RUN_DIR" ]]; then wait_for_log_end; fi
  fi
  rm -rf "$RUN_DIR"
}

# usage: run_child COMMAND...    (returns its exit status)
run_child() { run_child_within '' "$@"; }

# usage: run_child_within SECONDS COMMAND...    (fails if it takes longer; without SECONDS it may)
run_child_within() {
  local status=0
  guard
  start_child "${@:2}"
  if [[ -n "$1" ]]; then
    until_true "$1" 0 child_is_gone || true
    signal_child KILL
  fi
  wait "$child_pid" 2>/dev/null || status=$?
  child_pid=''
  trap - EXIT HUP INT TERM
  return "$status"
}

# -----------------------------------------------------------------------------
# The virtual environment

# Prints a Python that can make one.
find_python() {
  local name without_venv=''
  for name in python3.11 python3.12 python3.13 python3.14 python3 python; do
    python_is_new_enough "$name" || continue
    if "$name" -c 'import ensurepip, venv' >/dev/null 2>&1; then
      printf '%s\n' "$name"
      return 0
    fi
    without_venv="${without_venv:-$name}"
  done
  if [[ -n "$without_venv" ]]; then
    die "$EX_MISSING" "$without_venv has no venv module; on Debian or Ubuntu: sudo apt install \
python$(python_version "$without_venv")-venv"
  fi
  die "$EX_MISSING" "Python 3.11 or newer is missing; on Debian or Ubuntu: sudo apt install \
python3 python3-venv; on macOS: brew install python@3.11; else: https://www.python.org/downloads/"
}

venv_works() {
  python_is_new_enough "$VENV_PYTHON" && "$VENV_PYTHON" -c 'import pip' >/dev/null 2>&1
}

# Makes .venv if it is absent or broken.
make_venv() {
  local python
  if venv_works; then return 0; fi
  say 'making .venv'
  python="$(find_python)" || leave "$?"
  run_child "$python" -m venv --clear "$VENV" ||
    die "$EX_MISSING" "$python -m venv could not make $VENV; its own message stands above"
  : >"$VENV_MARK"
}

# usage: requirements_of PART    (prints that part of requirements.txt)
requirements_of() {
  local line part=worker pattern='^# -- ([a-z]+):'
  while IFS= read -r line || [[ -n "$line" ]]; do
    if [[ "$line" =~ $pattern ]]; then part="${BASH_REMATCH[1]}"; fi
    if [[ "$part" == "$1" ]]; then printf '%s\n' "$line"; fi
  done <"$ROOT/requirements.txt"
}

# usage: parts_for LISTEN    (prints the parts that the worker needs with this BARK_LISTEN)
parts_for() {
  case "$1" in
    '' | off) printf 'worker\n' ;;
    *) printf 'worker listening\n' ;;
  esac
}

# Prints the file that keeps requirements file $1 as it was when last installed completely.
stamp_of() {
  local name="${1#"$ROOT"/}"
  printf '%s/installed-%s\n' "$VENV" "${name//\//-}"
}

# usage: are_installed REQUIREMENTS_FILE...
are_installed() {
  local file
  for file in "$@"; do
    cmp -s "$file" "$(stamp_of "$file")" || return 1
  done
}

# usage: forget_installed REQUIREMENTS_FILE...    (before pip begins, which may not come to an end)
forget_installed() {
  local file
  for file in "$@"; do rm -f "$(stamp_of "$file")"; done
}

# usage: install_files NAMES REQUIREMENTS_FILE...    (NAMES is for people)
install_files() {
  local file arguments=()
  for file in "${@:2}"; do arguments+=(-r "$file"); done
  install_packages "$1" "${arguments[@]}"
  for file in "${@:2}"; do cp "$file" "$(stamp_of "$file")"; done
}

# usage: ensure_venv REQUIREMENTS_FILE...
# Makes .venv if need be, and installs the files if one changed since last time.
ensure_venv() {
  local file changed=''
  make_venv
  for file in "$@"; do
    if ! are_installed "$file"; then changed="$changed ${file#"$ROOT"/}"; fi
  done
  [[ -n "$changed" ]] || return 0
  say "installing$changed into .venv"
  forget_installed "$@"
  install_files "${changed# }" "$@"
}

# usage: install_packages NAMES PIP_ARGUMENTS...    (NAMES is for people)
install_packages() {
  forget_halves
  run_child run_pip install "${@:2}" ||
    die "$EX_MISSING" "pip could not install $1; its own message stands above. Run this \
again when that is mended"
}

# pip writes a package's RECORD last, and takes one without it for installed: it was cut short.
forget_halves() {
  local folder
  for folder in "$VENV"/lib/python*/site-packages/*.dist-info; do
    if [[ ! -e "$folder/RECORD" ]]; then rm -rf "$folder"; fi
  done
}

run_pip() {
  if [[ -n "$verbose" ]]; then
    "$VENV_PYTHON" -m pip --disable-pip-version-check "$@"
  else
    "$VENV_PYTHON" -I -S -c "$SHOW_BARS" --disable-pip-version-check "$@"
  fi
}

# Runs pip and shows of it its progress bars, and the end of the rest only if it fails. pip draws a
# live bar where FORCE_COLOR is set, as it cannot know that a terminal stands behind this.
readonly SHOW_BARS='
import os, re, subprocess, sys
if sys.stderr.isatty():
    os.environ["FORCE_COLOR"] = "1"
pip = subprocess.Popen([sys.executable, "-m", "pip", *sys.argv[1:]],
                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
bar = re.compile("\N{BOX DRAWINGS HEAVY HORIZONTAL}|[0-9.]+/[0-9.]+ [kMG]?B".encode())
held, rest, is_open = [], b"", False
while data := os.read(pip.stdout.fileno(), 65536):
    *lines, rest = (rest + data.replace(b"\x1b[?25l", b"")).split(b"\n")
    for line in lines:
        if is_open or bar.search(line):
            os.write(2, line + b"\n")
        else:
            held.append(line)
        is_open = False
    if rest and (is_open or b"\r" in rest and bar.search(rest)):
        os.write(2, rest)
        rest, is_open = b"", True
status = pip.wait()
if status:
    os.write(2, b"\n".join(line for line in held[-20:] + [rest] if line) + b"\n")
sys.exit(status if status >= 0 else 128 - status)
'

# Prints the packages in .venv that are complete, each as NAME-VERSION on a line.
packages() {
  local record
  for record in "$VENV"/lib/python*/site-packages/*.dist-info/RECORD; do
    record="${record%.dist-info/RECORD}"
    printf '%s\n' "${record##*/}"
  done
}

# usage: say_what_came PACKAGES_BEFORE
say_what_came() {
  local package torch='' count=0 size
  while IFS= read -r package; do
    if [[ $'\n'"$1"$'\n' == *$'\n'"$package"$'\n'* ]]; then continue; fi
    count=$((count + 1))
    if [[ "$package" == torch-* ]]; then torch=" (torch ${package#torch-})"; fi
  done <<<"$(packages)"
  ((count)) || return 0
  size="$("$VENV_PYTHON" -I -S -c 'import os, sys
print(sum(os.lstat(os.path.join(folder, name)).st_size
          for folder, _, names in os.walk(sys.argv[1]) for name in names) // 10**6)' "$VENV")"
  say "fetched $count packages$torch into $VENV, which has $size MB now (local --clean removes it)"
}

# usage: install_part PART NAMES    (of requirements.txt; NAMES are for people)
install_part() {
  local packages_before list="$VENV/requirements-$1.txt"
  make_venv
  requirements_of "$1" >"$list"
  if are_installed "$list" || are_installed "$ROOT/requirements.txt"; then return 0; fi
  say "installing $2 into .venv"
  packages_before="$(packages)"
  forget_installed "$list"
  install_files "$2" "$list"
  say_what_came "$packages_before"
}

# Prints the ids of processes that run from .venv, as far as can be told.
users_of_venv() {
  local place
  for place in "$VENV"/run-*; do
    if kill -0 "${place##*-}" 2>/dev/null; then printf '%s\n' "${place##*-}"; fi
  done
  while IFS= read -r place; do    # Linux: who has its libraries loaded
    place="${place#/proc/}"
    printf '%s\n' "${place%/maps}"
  done < <(grep -lsF "$VENV/" /proc/[0-9]*/maps 2>/dev/null)
}

# usage: keep_venv WHY
keep_venv() { die "$EX_UNHEALTHY" "$VENV $1"; }

# Removes the .venv that this script made, after asking.
clean_venv() {
  local users model=''
  if [[ ! -e "$VENV" && ! -L "$VENV" ]]; then
    say "there is no $VENV"
    return 0
  fi
  if [[ -L "$VENV" ]]; then keep_venv "is a link, so it stays; remove what you mean by hand"; fi
  if [[ ! -f "$VENV_MARK" ]]; then
    keep_venv "has not the mark of one that local made, so it stays; by hand: rm -r $VENV"
  fi
  users="$(users_of_venv)"
  if [[ -n "$users" ]]; then
    keep_venv "is in use by process ${users//$'\n'/, }, so it stays; end that first"
  fi
  IFS= read -r model < <(find "$VENV" \( -name 'models--*' -o -name 'model*.safetensors' \
    -o -name 'pytorch_model*.bin' \) 2>/dev/null) || true
  if [[ -n "$model" ]]; then
    die "$EX_UNHEALTHY" "there is a model in it, $model, so $VENV stays; move that first"
  fi
  agree "Remove $VENV? Downloaded models are elsewhere and stay." 'removing .venv' removed
  rm -rf "$VENV"
  say "$VENV is removed"
}

# -----------------------------------------------------------------------------
# The GPU and torch

# usage: torch_index DRIVER_CUDA    (the index of the build that suits it; nothing below 12.6)
torch_index() {
  local major="${1%%.*}" minor="${1#*.}"
  if ((major >= 13)); then
    printf 'cu130\n'
  elif ((major == 12 && minor >= 6)); then
    printf 'cu126\n'
  fi
}

# usage: pip_line VERSION INDEX
pip_line() {
  echo "  .venv/bin/pip install --force-reinstall torch==${1%%+*} --index-url $TORCH_WHEELS/$2"
}

# usage: torch_advice VERSION BUILT_FOR DRIVER_CUDA REASON    (prints what to do)
torch_advice() {
  local index built_index="cu${2//./}"
  index="$(torch_index "$3")"
  if [[ "$4" == *'no kernel image'* && "$2" == 13.* ]]; then
    index='cu126'    # CUDA 13 left out GPUs before Turing
  fi
  if [[ -z "$3" ]]; then
    echo 'nvidia-smi does not tell the CUDA version of its driver;' \
      'torch needs a driver for CUDA 12.6 (560) or newer.'
  elif [[ -z "$index" ]]; then
    echo "The driver supports CUDA $3, and torch ${1%%+*} needs 12.6: update the driver to 560 or" \
      'newer.'
    if [[ "$3" == 12.* ]]; then
      echo 'Until then its CUDA 12.6 build may do, as drivers run all of CUDA 12 in most cases:'
      pip_line "$1" cu126
    fi
  elif [[ "$index" == "$built_index" ]]; then
    echo "The driver supports CUDA $3 and torch was built for CUDA $2, which fits; look for" \
      'another cause: a driver updated without a reboot, or a container without the GPU.'
  else
    echo "The driver supports CUDA $3; this build of torch suits it:"
    pip_line "$1" "$index"
  fi
}

# usage: build_for DRIVER_CUDA    (prints the build of torch to install for it; fails if none runs)
# Drivers run all of their CUDA's major version in most cases. CUDA 13 left out GPUs before Turing,
# the build for 12.6 those from Blackwell on.
build_for() {
  local capability
  case "$1" in
    '') ;;    # pip's own may do
    [0-9].* | 10.* | 11.*) return 1 ;;
    12.*) if is_blackwell; then return 1; fi
      printf 'cu126\n' ;;
    *) capability="$(least_capability)"
      if ((${capability:-75} < 75)); then printf 'cu126\n'; else printf 'cu130\n'; fi ;;
  esac
}

is_blackwell() {
  local capability
  capability="$(least_capability)"
  ((${capability:-0} >= 100))
}

# Prints the least compute capability of the GPUs here, in tenths; nothing if it cannot be told.
least_capability() {
  local line least=''
  while IFS= read -r line; do
    [[ "$line" =~ ^([0-9]+)\.([0-9])$ ]] || continue
    line="${BASH_REMATCH[1]}${BASH_REMATCH[2]}"
    if [[ -z "$least" ]] || ((line < least)); then least="$line"; fi
  done <<<"$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null)"
  printf '%s\n' "$least"
}

# Prints the version of torch that requirements.txt asks for.
torch_wanted() {
  local pattern=$'(^|\n)torch==([0-9.]+)'
  if [[ "$(requirements_of worker)" =~ $pattern ]]; then
    printf '%s\n' "${BASH_REMATCH[2]}"
  fi
}

# Prints the version and build of torch in .venv, as 2.13.0+cpu; PyPI's have no build in it.
torch_here() {
  local package
  while IFS= read -r package; do
    if [[ "$package" == torch-* ]]; then printf '%s\n' "${package#torch-}"; fi
  done <<<"$(packages)"
}

# usage: torch_fits HERE VERSION BUILD    (whether what is there does; PyPI's is for CUDA 13.0)
torch_fits() {
  [[ "${1%%+*}" == "$2" ]] || return 1
  case "$3" in
    cpu | '') return 0 ;;    # every build computes on the CPU
    cu130) [[ "$1" == "$2" || "$1" == *+cu13* ]] ;;
    *) [[ "$1" == *"+${3%?}"* ]] ;;
  esac
}

# usage: pip_finds_torch VERSION PIP_OPTIONS...    (whether it does so within REACH_SECONDS; any
# build will do unless VERSION names one)
pip_finds_torch() {
  local found='' pattern='Available versions: ([^'$'\n'']*)'
  if run_child_within "$REACH_SECONDS" list_torch "${@:2}"; then
    found="$(<"$VENV/torch-versions")"
  fi
  [[ "$found" =~ $pattern ]] && [[ ", ${BASH_REMATCH[1]}," == *", $1"[,+]* ]]
}

list_torch() {
  "$VENV_PYTHON" -m pip index versions torch --disable-pip-version-check --retries 0 --timeout 5 \
    "$@" >"$VENV/torch-versions" 2>/dev/null
}

# Prints which of pip's settings of a person say where packages come from, by blanks: of the
# environment and of every pip.conf. PyPI's own address is none.
own_settings() {
  local line name settings='' not_set="='(0|no|off|false|False)?'\$"
  not_set="$not_set|[.]index-url=.*//pypi.org/simple"
  while IFS= read -r line; do
    name="${line%%=*}"
    case "${name##*.}" in
      index-url | no-index | extra-index-url | find-links)
        if [[ ! "$line" =~ $not_set ]]; then settings="$settings ${name##*.}"; fi ;;
    esac
  done <<<"$("$VENV_PYTHON" -m pip config list 2>/dev/null)"
  printf '%s\n' "$settings"
}

# usage: choose_torch VERSION BUILD    (fails if what BUILD asks for cannot be had)
# Sets, of its caller, torch_arguments: what pip installs first, if that is needed for the right
# build of torch; and torch_source: where it comes from, for people.
choose_torch() {
  local index="$TORCH_WHEELS/$2" settings
  torch_arguments=() torch_source=''
  [[ -n "$2" ]] || return 0
  settings="$(own_settings)"
  if [[ -n "$settings" ]] && pip_finds_torch "$1+$2"; then
    torch_arguments=("torch==$1+$2") torch_source="$2 build, from where pip's settings say"
  elif [[ "$2" != cu126 && "$settings" == *find-links* ]] && pip_finds_torch "$1" --no-index; then
    torch_arguments=("torch==$1" --no-index) torch_source="from where pip's settings say"
  elif [[ "$2" == cpu && "$settings" == *' index-url'* || "$settings$2" == *no-index*cpu ]]; then
    torch_source="from where pip's settings say"
  elif [[ -z "$settings" && "$2" == cu130 && -z "$(torch_here)" ]]; then
    torch_source='cu130 build, which is pip'\''s own'
  elif [[ "$settings" != *no-index* ]] && pip_finds_torch "$1+$2" --index-url "$index"; then
    torch_arguments=("torch==$1+$2" --index-url "$index") torch_source="$2 build, from $index"
  elif [[ "$2" == cpu || "$2" == cu130 && "$(torch_here)" != "$1+"* ]]; then
    torch_source="pip's own, as its $2 build cannot be had from $index"
  else
    return 1
  fi
}

# usage: install_worker NO_GPU LISTEN
# Installs what the worker needs, torch in the build that fits, each thing once. NO_GPU says why
# there is none, and is empty where there is one; LISTEN is as BARK_LISTEN.
install_worker() {
  local version build=cpu driver='' packages_before torch_arguments=() torch_source='' part lists=()
  make_venv
  for part in $(parts_for "$2"); do
    requirements_of "$part" >"$VENV/requirements-$part.txt"
    lists+=("$VENV/requirements-$part.txt")
  done
  version="$(torch_wanted)"
  if [[ "$OSTYPE" != linux* ]]; then build=''; fi    # elsewhere pip's own is the only one
  if [[ -z "$1" ]]; then
    driver="$(driver_cuda)"
    build="$(build_for "$driver")" || die_for_driver "$version" "$driver"
  fi
  if torch_fits "$(torch_here)" "$version" "$build"; then
    if are_installed "${lists[@]}" || are_installed "$ROOT/requirements.txt"; then return 0; fi
    torch_arguments=() torch_source='there already'
  else
    choose_torch "$version" "$build" || die_for_driver "$version" "$driver"
  fi
  say "installing torch $version${torch_source:+ ($torch_source)} and what else the worker needs" \
    'into .venv'
  packages_before="$(packages)"
  forget_installed "${lists[@]}"
  if ((${#torch_arguments[@]})); then install_torch "$build"; fi
  install_files "the worker's packages" "${lists[@]}"
  say_what_came "$packages_before"
}

# usage: install_torch BUILD    (as chosen; without a GPU pip's own will do, too)
install_torch() {
  if [[ "$1" != cpu ]]; then
    install_packages "the worker's packages" --no-deps "${torch_arguments[@]}"
    return 0
  fi
  forget_halves
  run_child run_pip install --no-deps "${torch_arguments[@]}" ||
    say "its $1 build could not be fetched, see above; pip's own is taken"
}

# usage: die_for_driver VERSION DRIVER_CUDA    (before anything is fetched that could not run)
die_for_driver() {
  local advice
  advice="$(torch_advice "$1" none "$2" '')"
  if [[ "$2" == 12.* ]] && is_blackwell; then
    advice="The driver supports CUDA $2, and this GPU needs torch for 13.0: update it to 580 or \
newer."
  fi
  die_without_gpu 'there is no torch to install for this GPU.' "$advice"
}

# usage: die_without_gpu FAULT ADVICE
die_without_gpu() {
  die "$EX_MISSING" "$1
$2
Or leave the GPU alone: BARK_DEVICE=cpu ./$PROGRAM local"
}

# Ends with a way out unless torch computes on the GPU that nvidia-smi shows.
require_torch_on_gpu() {
  local report usable version built_for reason
  report="$(torch_report)" || die "$EX_MISSING" 'torch does not load; its own message stands above'
  IFS='|' read -r usable version built_for reason <<<"$report"
  if [[ "$usable" == yes ]]; then return 0; fi
  if [[ "$built_for" == none ]]; then reason='it is a build for the CPU only'; fi
  die_without_gpu "torch $version cannot use an NVIDIA GPU: ${reason:-it sees no device}" \
    "$(torch_advice "$version" "$built_for" "$(driver_cuda)" "$reason")"
}

# -----------------------------------------------------------------------------
# local

# Copies the worker's log to stderr and notes the address it listens on. Left out is what
# `wait_until_ready` tells in fewer words, the notice about the CPU, which we gave, and, unless all
# is wanted, whatever is no warning until it is ready. A line of JSON is for a program, and stays.
relay_log() {
  local line ready="$verbose" info='^[0-9-]+ [0-9:,]+ INFO '
  local pattern='[ "]listening on (http://[^ "]+)("|$)'
  trap '' HUP INT TERM
  while IFS= read -r line || [[ -n "$line" ]]; do
    if [[ "$line" =~ $pattern ]]; then printf '%s\n' "${BASH_REMATCH[1]}" >"$RUN_DIR/address"; fi
    case "$line" in
      '{'*) say "$line" ;;
      *' INFO status=ready'*) ready=yes ;;
      *' INFO status='* | *' INFO downloading '* | *' INFO staying up '*) ;;
      *' WARNING '*'; BARK_MODEL chooses: '*) ;;
      *' INFO '*) if [[ -n "$ready" || ! "$line" =~ $info ]]; then say "$line"; fi ;;
      *) say "$line" ;;
    esac
  done
  : >"$RUN_DIR/log-ended"
}

# The worker's last words come before ours. Bash 3.2 cannot wait for a process substitution.
wait_for_log_end() { until_true 5 0 test -e "$RUN_DIR/log-ended" || true; }

# Fails if the worker ends before it listens.
wait_for_address() {
  until [[ -s "$RUN_DIR/address" ]]; do
    child_lives || return 1
    short_pause
  done
}

# Prints the address at which this machine reaches the worker.
local_address() {
  local address
  IFS= read -r address <"$RUN_DIR/address"
  case "$address" in
    http://0.0.0.0:*) printf 'http://127.0.0.1:%s\n' "${address##*:}" ;;
    'http://[::]:'*) printf 'http://[::1]:%s\n' "${address##*:}" ;;
    *) printf '%s\n' "$address" ;;
  esac
}

# usage: wait_until_ready ADDRESS    (fails if the worker fails, ends or is mute)
wait_until_ready() {
  local health last='' heard=$now
  while child_lives && ((now < heard + SILENT_SECONDS)); do
    if health="$(worker_health "$1")"; then
      heard=$now
      case "$health" in
        "$last") ;;
        'ready '*) end_state; say "ready after $SECONDS s; listen in a browser: $1/"; return 0 ;;
        'failed '*) end_state; say "the worker failed: ${health#failed }"; return 1 ;;
        *) show_state "${health% }" ;;
      esac
      last="$health"
    fi
    short_pause
  done
  end_state
  if child_lives; then say "the worker has not answered at $1/health for $SILENT_SECONDS s"; fi
  return 1
}

# usage: show_state STATE    (each in the place of the last; on no terminal only if all is wanted)
show_state() {
  if [[ -n "$verbose" ]]; then
    say "$1"
  elif [[ -t 2 ]]; then
    printf '\r\033[K%s' "$1" >&2 || true
    line_open=yes
  fi
}

end_state() {
  if [[ -n "$line_open" ]]; then printf '\r\033[K' >&2 || true; fi
  line_open=''
}

readonly HELLO='Good evening, and welcome.'    # is understood in both of the built-in voices

# usage: how_to_call ADDRESS    (prints two lines; the key stays a variable in them)
how_to_call() {
  local key='' play='listen to hello.wav' player
  if [[ -n "${BARK_API_KEY:-}" ]]; then key=" -H \"Authorization: Bearer \$BARK_API_KEY\""; fi
  load test
  if player="$(find_player)"; then play="$player hello.wav"; fi
  printf '%s\n' "curl -sSf $1/synthesize$key -H 'Accept: audio/wav'\
 -H 'Content-Type: application/json' -d '{\"text\": \"$HELLO\"}' -o hello.wav"
  printf '%s\n' "then: $play; how the worker is: $1/health; Ctrl-C here ends it"
}

# usage: run_worker MODEL NO_GPU LISTEN    (until it ends, or a signal ends both)
# While it imports what it needs, torch is tried on the GPU.
run_worker() {
  local address status=0
  guard
  mkdir "$RUN_DIR"
  export BARK_MODEL="$1" BARK_LISTEN="$3"
  export HOST="${HOST:-127.0.0.1}"    # without a key, a port on a shared network is open to all
  if [[ -n "$verbose" ]]; then say "starting bark-worker.py with $1"; fi
  start_child "$VENV_PYTHON" -u "$WORKER" 2> >(relay_log)
  if [[ -z "$2" ]] && ! (require_torch_on_gpu); then
    end_child || true
    leave "$EX_MISSING"
  fi
  if wait_for_address && address="$(local_address)" && wait_until_ready "$address"; then
    how_to_call "$address"
    wait "$child_pid" || status=$?
    wait_for_log_end
    die "$EX_UNHEALTHY" "the worker ended by itself with exit status $status"
  fi
  end_child || status=$?
  wait_for_log_end
  if [[ "$status" == "$EX_USAGE" ]]; then
    die "$EX_USAGE" 'the worker refused its settings, see above'
  fi
  die "$EX_UNHEALTHY" "the worker did not get ready (its exit status: $status)"
}

# usage: say_who_speaks NO_GPU MODEL    (never falls back in silence)
say_who_speaks() {
  if [[ -z "$1" ]]; then
    say "an NVIDIA GPU is here: ${2:-suno/bark} speaks"
  elif [[ "$2" == "$BUILTIN_VOICE" ]]; then
    say "$1: the small built-in voice speaks\
 (--model suno/bark-small: the real Bark on a CPU, slow)"
  else
    say "$1: $2 runs on the CPU, slowly"
  fi
}

cmd_local() {
  local model="${BARK_MODEL:-}" listen="${BARK_LISTEN:-}" no_gpu clean=''
  read_options local '--model=model --listen=listen --verbose:verbose --clean:clean
 --yes:agreed' "$@"
  if [[ -n "$clean" ]]; then clean_venv; return 0; fi
  if [[ -n "$agreed" ]]; then usage_error '--yes goes with --clean' local; fi
  [[ -f "$WORKER" && -f "$ROOT/requirements.txt" ]] ||
    die "$EX_MISSING" "bark-worker.py and requirements.txt must lie beside this script, in $ROOT"
  if [[ "$model" == builtin-voice ]]; then model="$BUILTIN_VOICE"; fi
  no_gpu="$(why_no_gpu)"
  if [[ -n "$no_gpu" ]]; then model="${model:-$BUILTIN_VOICE}"; fi
  say_who_speaks "$no_gpu" "$model"
  install_worker "$no_gpu" "$listen"
  run_worker "${model:-suno/bark}" "$no_gpu" "$listen"
}

loaded="$loaded local"
