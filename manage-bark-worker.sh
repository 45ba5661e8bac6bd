#!/usr/bin/env bash
# Runs a Bark worker on this machine: makes its virtual environment, starts it, says how to call it.
# Works under bash 3.2, as macOS has it. `source` it to use its functions.
set -euo pipefail

# -----------------------------------------------------------------------------
# Constants

[[ "${BASH_SOURCE[0]}" == */* ]] && ROOT="${BASH_SOURCE[0]%/*}" || ROOT='.'
ROOT="$(cd "$ROOT" && pwd -P)"
readonly ROOT
readonly PROGRAM='manage-bark-worker.sh'
readonly WORKER="$ROOT/bark-worker.py"
readonly BUILTIN_VOICE="$ROOT/builtin-voice"
readonly VENV="$ROOT/.venv"
readonly VENV_PYTHON="$VENV/bin/python"
readonly RUN_DIR="$VENV/run-$$"    # what the worker's log told, while it runs
readonly END_SECONDS=15            # the worker may finish its work for 10 s after SIGTERM
readonly SILENT_SECONDS=60         # without an answer from /health the worker counts as hung
readonly EX_UNHEALTHY=1 EX_USAGE=2 EX_MISSING=3

readonly USAGE="usage: $PROGRAM COMMAND [OPTIONS]

commands:
  local            run a worker on this machine until Ctrl-C
  help [COMMAND]   show this, or one command's options

exit status: 0 ok, 1 the worker failed or ended by itself, 2 wrong usage or configuration,
3 something is missing (the message says how to get it), 129/130/143 ended by a signal"

readonly USAGE_LOCAL="usage: $PROGRAM local [--model ID]

Makes .venv beside this script, installs requirements.txt into it when that changed, starts
bark-worker.py and says how to call it. Ctrl-C ends it.

  --model ID   hub id or folder of the model (the same as BARK_MODEL=ID); without one,
               suno/bark on an NVIDIA GPU, else the small builtin-voice

The environment goes to the worker: PORT, HOST, BARK_VOICE, BARK_API_KEY and the others that
bark-worker.py --help lists; only HOST is 127.0.0.1 if unset, so that nobody else can call it.
BARK_DEVICE=cpu leaves the GPU alone."

readonly USAGE_HELP="usage: $PROGRAM help [COMMAND]"

# -----------------------------------------------------------------------------
# Messages: stdout carries the answer, stderr everything else

say() { printf '%s\n' "$*" >&2; }

# usage: die STATUS MESSAGE
die() {
  say "$PROGRAM: $2"
  exit "$1"
}

# usage: usage_error MESSAGE USAGE
usage_error() { die "$EX_USAGE" "$1"$'\n'"$2"; }

# -----------------------------------------------------------------------------
# Adapters: the only functions that ask Python, nvidia-smi or the worker

# usage: python_is_new_enough PYTHON    (numpy, scipy and transformers all ask for 3.11)
python_is_new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

python_version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

# Prints one line, STATUS DETAIL, of the worker at address $1; fails if it does not answer.
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
    cpu) printf 'BARK_DEVICE=cpu leaves the GPU alone\n'; return ;;
    cuda*) return ;;
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

# From here on, whatever ends this script ends the child too.
guard_child() {
  trap finish EXIT
  trap 'exit 129' HUP
  trap 'exit 130' INT
  trap 'exit 143' TERM
}

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

# Asks the child to end, makes it after END_SECONDS, and returns its exit status.
end_child() {
  local deadline=$((SECONDS + END_SECONDS)) status=0
  signal_child TERM
  while child_lives && ((SECONDS < deadline)); do pause; done
  signal_child KILL
  wait "$child_pid" 2>/dev/null || status=$?
  return "$status"
}

finish() {
  trap '' HUP PIPE    # nobody may be reading any more; the child must end all the same
  trap 'signal_child KILL' INT TERM
  if child_lives; then
    say 'stopping: running requests may finish for 10 s (Ctrl-C again: at once)' || true
    end_child || true
    [[ ! -d "$RUN_DIR" ]] || wait_for_log_end
  fi
  rm -rf "$RUN_DIR"
}

# usage: run_child COMMAND...    (returns its exit status)
run_child() {
  local status=0
  guard_child
  start_child "$@"
  wait "$child_pid" || status=$?
  child_pid=''
  trap - EXIT HUP INT TERM
  return "$status"
}

pause() { sleep 0.2 || true; }

# -----------------------------------------------------------------------------
# The virtual environment

# Prints a Python that can make one.
find_python() {
  local name without_venv=''
  for name in python3.11 python3.12 python3.13 python3.14 python3 python; do
    python_is_new_enough "$name" || continue
    if "$name" -c 'import ensurepip, venv' >/dev/null 2>&1; then
      printf '%s\n' "$name"
      return
    fi
    without_venv="${without_venv:-$name}"
  done
  [[ -z "$without_venv" ]] || die "$EX_MISSING" "$without_venv has no venv module; on Debian or \
Ubuntu: sudo apt install python$(python_version "$without_venv")-venv"
  die "$EX_MISSING" "Python 3.11 or newer is missing; on Debian or Ubuntu: sudo apt install \
python3 python3-venv; on macOS: brew install python@3.11; else: https://www.python.org/downloads/"
}

venv_works() {
  python_is_new_enough "$VENV_PYTHON" && "$VENV_PYTHON" -c 'import pip' >/dev/null 2>&1
}

make_venv() {
  local python
  python="$(find_python)" || exit
  say "making .venv with $python"
  run_child "$python" -m venv --clear "$VENV" ||
    die "$EX_MISSING" "$python -m venv could not make $VENV; its own message stands above"
}

# Prints the file that keeps requirements file $1 as it was when last installed completely.
stamp_of() {
  local name="${1#"$ROOT"/}"
  printf '%s/installed-%s\n' "$VENV" "${name//\//-}"
}

is_installed() { cmp -s "$1" "$(stamp_of "$1")"; }

# usage: ensure_venv REQUIREMENTS_FILE...
# Makes .venv if it is absent or broken, and installs the files if one changed since last time.
ensure_venv() {
  local file changed='' arguments=()
  venv_works || make_venv
  for file in "$@"; do
    arguments+=(-r "$file")
    is_installed "$file" || changed="$changed ${file#"$ROOT"/}"
  done
  [[ -n "$changed" ]] || return 0
  say "installing$changed into .venv (the first time that is a large download, torch above all)"
  for file in "$@"; do rm -f "$(stamp_of "$file")"; done
  run_child "$VENV_PYTHON" -m pip install --disable-pip-version-check "${arguments[@]}" ||
    die "$EX_MISSING" "pip could not install$changed; its own message stands above. Run this again \
when that is mended"
  for file in "$@"; do cp "$file" "$(stamp_of "$file")"; done
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
  printf '  .venv/bin/pip install --force-reinstall torch==%s' "${1%%+*}"
  printf ' --index-url https://download.pytorch.org/whl/%s\n' "$2"
}

# usage: torch_advice VERSION BUILT_FOR DRIVER_CUDA REASON    (prints what to do)
torch_advice() {
  local index built_index="cu${2//./}"
  [[ -n "$3" ]] || { echo 'nvidia-smi does not tell the CUDA version of its driver;' \
    'torch needs a driver for CUDA 12.6 (560) or newer.'; return; }
  index="$(torch_index "$3")"
  if [[ "$4" == *'no kernel image'* && "$2" == 13.* ]]; then
    index='cu126'    # CUDA 13 left out GPUs before Turing
  fi
  if [[ -z "$index" ]]; then
    echo "The driver supports CUDA $3, and torch ${1%%+*} needs 12.6: update the driver to 560 or" \
      'newer.'
    [[ "$3" != 12.* ]] || { echo 'Until then its CUDA 12.6 build may do, as drivers run all of' \
      'CUDA 12 in most cases:'; pip_line "$1" cu126; }
  elif [[ "$index" == "$built_index" ]]; then
    echo "The driver supports CUDA $3 and torch was built for CUDA $2, which fits; look for" \
      'another cause: a driver updated without a reboot, or a container without the GPU.'
  else
    echo "The driver supports CUDA $3; this build of torch suits it:"
    pip_line "$1" "$index"
  fi
}

# Ends with a way out unless torch computes on the GPU that nvidia-smi shows.
require_torch_on_gpu() {
  local report usable version built_for reason
  report="$(torch_report)" || die "$EX_MISSING" 'torch does not load; its own message stands above'
  IFS='|' read -r usable version built_for reason <<<"$report"
  [[ "$usable" != yes ]] || return 0
  [[ "$built_for" != none ]] || reason='it is a build for the CPU only'
  die "$EX_MISSING" "torch $version cannot use an NVIDIA GPU: \
${reason:-it sees no device}
$(torch_advice "$version" "$built_for" "$(driver_cuda)" "$reason")
Or leave the GPU alone: BARK_DEVICE=cpu ./$PROGRAM local"
}

# -----------------------------------------------------------------------------
# local

# Copies the worker's log to stderr and notes the address it listens on. Its lines about its own
# state are left out: `wait_until_ready` tells that in fewer.
relay_log() {
  local line pattern=' listening on (http://[^ ]+)$'
  trap '' HUP INT TERM
  while IFS= read -r line || [[ -n "$line" ]]; do
    if [[ "$line" =~ $pattern ]]; then printf '%s\n' "${BASH_REMATCH[1]}" >"$RUN_DIR/address"; fi
    case "$line" in
      *' INFO status='* | *' INFO downloading '* | *' INFO staying up '*) ;;
      *) say "$line" ;;
    esac
  done
  : >"$RUN_DIR/log-ended"
}

# The worker's last words come before ours. Bash 3.2 cannot wait for a process substitution.
wait_for_log_end() {
  local deadline=$((SECONDS + 5))
  until [[ -e "$RUN_DIR/log-ended" ]] || ((SECONDS >= deadline)); do pause; done
}

# Fails if the worker ends before it listens.
wait_for_address() {
  until [[ -s "$RUN_DIR/address" ]]; do
    child_lives || return 1
    pause
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

# usage: wait_until_ready ADDRESS    (shows each change; fails if the worker fails, ends or is mute)
wait_until_ready() {
  local health last='' heard=$SECONDS
  while child_lives && ((SECONDS < heard + SILENT_SECONDS)); do
    if health="$(worker_health "$1")"; then
      heard=$SECONDS
      [[ "$health" == "$last" ]] || case "$health" in
        'ready '*) say "ready after $SECONDS s"; return ;;
        'failed '*) say "the worker failed: ${health#failed }"; return 1 ;;
        *) say "${health% }" ;;
      esac
      last="$health"
    fi
    pause
  done
  ! child_lives || say "the worker has not answered at $1/health for $SILENT_SECONDS s"
  return 1
}

# usage: how_to_call ADDRESS    (prints two lines; the key stays a variable in them)
how_to_call() {
  local key='' play='listen to hello.wav' player
  if [[ -n "${BARK_API_KEY:-}" ]]; then key=" -H \"Authorization: Bearer \$BARK_API_KEY\""; fi
  for player in aplay afplay paplay ffplay; do
    if command -v "$player" >/dev/null 2>&1; then play="$player hello.wav"; break; fi
  done
  printf '%s\n' "curl -sSf $1/synthesize$key -H 'Accept: audio/wav'\
 -H 'Content-Type: application/json' -d '{\"text\": \"Hello\"}' -o hello.wav"
  printf '%s\n' "then: $play; how the worker is: $1/health; Ctrl-C here ends it"
}

# usage: run_worker MODEL    (until it ends, or a signal ends both)
run_worker() {
  local address status=0
  guard_child
  mkdir "$RUN_DIR"
  export BARK_MODEL="$1"
  export HOST="${HOST:-127.0.0.1}"    # without a key, a port on a shared network is open to all
  say "starting bark-worker.py with $1"
  start_child "$VENV_PYTHON" -u "$WORKER" 2> >(relay_log)
  if wait_for_address && address="$(local_address)" && wait_until_ready "$address"; then
    how_to_call "$address"
    wait "$child_pid" || status=$?
    wait_for_log_end
    die "$EX_UNHEALTHY" "the worker ended by itself with exit status $status"
  fi
  end_child || status=$?
  wait_for_log_end
  [[ "$status" != "$EX_USAGE" ]] || die "$EX_USAGE" 'the worker refused its settings, see above'
  die "$EX_UNHEALTHY" "the worker did not get ready (its exit status: $status)"
}

# usage: say_about_cpu REASON MODEL    (never falls back in silence)
say_about_cpu() {
  if [[ "$2" == "$BUILTIN_VOICE" ]]; then
    say "$1: the small built-in voice speaks\
 (--model suno/bark-small: the real Bark on a CPU, slow)"
  else
    say "$1: $2 runs on the CPU, slowly"
  fi
}

cmd_local() {
  local model="${BARK_MODEL:-}" no_gpu
  while (($#)); do
    case "$1" in
      --model=*) set -- --model "${1#*=}" "${@:2}"; continue ;;
      --model) [[ -n "${2:-}" ]] || usage_error '--model needs an ID' "$USAGE_LOCAL"
        model="$2"; shift ;;
      -h | --help) printf '%s\n' "$USAGE_LOCAL"; return ;;
      *) usage_error "local knows no '$1'" "$USAGE_LOCAL" ;;
    esac
    shift
  done
  [[ -f "$WORKER" && -f "$ROOT/requirements.txt" ]] ||
    die "$EX_MISSING" "bark-worker.py and requirements.txt must lie beside this script, in $ROOT"
  [[ "$model" != builtin-voice ]] || model="$BUILTIN_VOICE"
  no_gpu="$(why_no_gpu)"
  if [[ -n "$no_gpu" ]]; then
    model="${model:-$BUILTIN_VOICE}"
    say_about_cpu "$no_gpu" "$model"
  fi
  ensure_venv "$ROOT/requirements.txt"
  [[ -n "$no_gpu" ]] || require_torch_on_gpu
  run_worker "${model:-suno/bark}"
}

# -----------------------------------------------------------------------------
# help, main

cmd_help() {
  (($# <= 1)) || usage_error 'help takes one command' "$USAGE_HELP"
  case "${1:-}" in
    '') printf '%s\n' "$USAGE" ;;
    local) printf '%s\n' "$USAGE_LOCAL" ;;
    help) printf '%s\n' "$USAGE_HELP" ;;
    *) usage_error "unknown command '$1'" "$USAGE" ;;
  esac
}

main() {
  case "${1:-}" in
    local | help) "cmd_$1" "${@:2}" ;;
    -h | --help) printf '%s\n' "$USAGE" ;;
    '') usage_error 'a command is needed' "$USAGE" ;;
    *) usage_error "unknown command '$1'" "$USAGE" ;;
  esac
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then main "$@"; fi
