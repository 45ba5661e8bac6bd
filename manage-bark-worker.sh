#!/usr/bin/env bash
# Rents a GPU on Vast.ai for the Bark worker, watches it and gives it back: with this file alone
# whatever was rented can be ended. Works under bash 3.2, as macOS has it. `source` it to use its
# functions.
#
# Sections: constants; help; messages; loading; time; options; adapters; facts; instances; the
#   journal; giving back; offers; waiting for a worker; start; status; logs; env; stop, destroy;
#   help, main
# Call vastai: call_cli (all go through vast)
# Call curl: send_url health_of known_gpus
# Change what is billed: order_instance ask_to_start destroy_once give_back_woken stop_one
#   has_stopped
#
# shellcheck disable=SC2016    # programs of jq stand in single quotes
set -euo pipefail

# -----------------------------------------------------------------------------
# Constants

# What starts this file again from where it was called, for commands to copy.
CALLED="${BASH_SOURCE[0]}"
if [[ "$CALLED" != */* ]]; then CALLED="./$CALLED"; fi
if [[ "$CALLED" != "./${CALLED##*/}" ]]; then
  CALLED="$(cd "${CALLED%/*}" && pwd)/${CALLED##*/}"
fi
printf -v CALLED '%q' "$CALLED"
readonly AGAIN="${BARK_LABEL:+BARK_LABEL=$BARK_LABEL }$CALLED"

# The folder of this file itself, wherever links to it lie. macOS has no readlink -f.
ROOT="${BASH_SOURCE[0]}"
while [[ -L "$ROOT" ]]; do
  LINK="$(readlink "$ROOT")"
  if [[ "$LINK" != /* && "$ROOT" == */* ]]; then LINK="${ROOT%/*}/$LINK"; fi
  ROOT="$LINK"
done
if [[ "$ROOT" != */* ]]; then ROOT="./$ROOT"; fi
ROOT="$(cd "${ROOT%/*}" && pwd -P)"
readonly ROOT
readonly PROGRAM='manage-bark-worker.sh'
readonly VERSION=0.1.0    # of the worker beside it, too
readonly VENV="$ROOT/.venv"
readonly EX_UNHEALTHY=1 EX_USAGE=2 EX_MISSING=3 EX_REFUSED=4 EX_NO_INSTANCE=5 EX_LATE=6

readonly LABEL="${BARK_LABEL:-bark-worker}"    # what makes an instance ours
readonly POLL="${BARK_POLL:-5}"                # seconds between looks
readonly DEFAULT_IMAGE='ghcr.io/darvondoom/libread-bark-tts:latest'
readonly VASTAI_VERSION=1.9.1
readonly CONSOLE_URL="${VAST_URL:-https://console.vast.ai}"
readonly WORKER_PORT=8080
readonly MODELS=/workspace/models              # on the instance's disk, which outlives a stop
# From 8 GB on, cheap to rent, and run by the image's build of torch.
readonly GPUS_OF_2020='RTX 3060,RTX 3060 Ti,RTX 3070,RTX 3070 Ti,RTX 3080,RTX 3080 Ti,RTX A4000'
readonly GPUS_OF_2023='RTX 4060,RTX 4060 Ti,RTX 4070'
readonly DEFAULT_GPUS="$GPUS_OF_2020,$GPUS_OF_2023"
readonly FIRST_START_GB=10        # image and model, which the first start downloads
readonly MIN_DOWNLOAD=200         # Mb/s; 10 GB take 7 minutes at that rate
readonly ATTEMPTS=3               # instances that one start rents at most, one after the other
readonly ORDERS=8                 # offers it asks for at most; some are gone when it does
readonly SCHEDULING_SECONDS=60    # still scheduling then: the GPU is somebody else's
readonly APPEAR_SECONDS=30        # that a new instance may take to show up in Vast's list
readonly UNANSWERED_SECONDS=120   # that an order without an answer is looked for
readonly GIVE_BACK_SECONDS=90     # that is tried to give back what was rented
readonly CALL_SECONDS=120         # that a call of Vast's CLI may take
readonly PORT_SECONDS=300         # of a running container without a port: there will be none
readonly LOST_LOOKS=3             # so many say offline or unknown, LOST_APART s apart: it is
readonly LOST_APART=4
readonly DRAIN_SECONDS=60         # that `stop` gives running requests
readonly STOP_SECONDS=120         # that Vast may take to stop an instance
readonly LOG_SECONDS=30           # between looks at the log of a worker that is silent
readonly TIMEOUT=1200             # that an instance may take to get healthy
readonly IDLE_STOP=30 START_LIMIT=60    # minutes; by these an instance stops itself
readonly MOST_MINUTES=10080 MOST_HOURS=8760    # that the worker takes for them
readonly HOURS_A_MONTH=720        # of Vast's storage price, which is per month
readonly JOURNAL_BYTES=262144     # of orders.log, which then becomes orders.log.old
# Settings that pass from this environment to a rented worker.
readonly PASSED_ON='TTS_MAX_LENGTH BARK_DTYPE BARK_MAX_BATCH BARK_MAX_QUEUE BARK_TIMEOUT
BARK_DETERMINISTIC BARK_EXPRESSION BARK_QUALITY BARK_RETRIES BARK_WORD_ERRORS BARK_CACHE_MB
BARK_CORS_ORIGINS BARK_METRICS BARK_LOG_FORMAT'

# What the instance runs whenever its container starts. In SSH mode Vast replaces the image's own
# entrypoint, so this starts the worker, and again after a crash; not after a clean end (0) or
# settings that it refuses (2). `vastai logs` shows what process 1 prints, and no files.
# No here-document holds it, as old shells write those to files: `stop` has to work on a full disk.
readonly TO_CONSOLE='(: >/proc/1/fd/1) 2>/dev/null && exec >/proc/1/fd/1 2>&1
'

# Beside the worker, what has to end the rent also where there is none: BARK_START_LIMIT minutes in
# a row without one that is ready, BARK_MAX_HOURS over. It goes by the monotonic clock; from the
# last heartbeat, whose file tells the worker what is left, a container goes on counting if that is
# at most 15 minutes old. Its hours are given back before an order to stop, after which nothing may
# run any more, and taken again if it did not do. What is no number counts as 60 minutes and 0
# hours: the worker refuses it, so that nothing gets ready.
readonly WATCH='if [ -n "$BARK_START_LIMIT$BARK_MAX_HOURS" ]; then
until python3 -I - <<"END"
import json, os, signal, time, urllib.error, urllib.request as web
get, now = os.environ.get, time.monotonic
counts = {}
for name, wrong in ("BARK_START_LIMIT", 60), ("BARK_MAX_HOURS", 0):
  try:
    counts[name] = float(get(name) or 0)
    assert 0 <= counts[name] < 1e9
  except Exception:
    counts[name] = wrong
limit, most = 60 * counts["BARK_START_LIMIT"], 3600 * counts["BARK_MAX_HOURS"]
key, number, host = get("CONTAINER_API_KEY"), get("CONTAINER_ID") or "", get("HOST") or "0.0.0.0"
host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)
models = get("HF_HOME") or "/root/.cache/huggingface"
files = [d + "/bark-guard.json" for d in (models + "/bark-worker", get("TMPDIR") or "/tmp")]
def late(*_):
  raise OSError("no answer in time")
signal.signal(signal.SIGALRM, late)
def ask(call, *what):
  global status, said
  status, said = 0, ""
  try:
    signal.alarm(30)
    with call(web.Request(*what), timeout=20) as reply:
      status, said = reply.status, reply.read(9999)
  except urllib.error.HTTPError as error:
    status = error.code
  except Exception as error:
    said = str(error)
  finally:
    signal.alarm(0)
def stop():
  global problem
  head = {"Authorization": "Bearer " + key, "User-Agent": "bark-guard"}
  head["Content-Type"] = "application/json"
  vast = (get("VAST_URL") or "https://console.vast.ai").rstrip("/")
  order = json.dumps({"state": "stopped"}).encode()
  ask(web.urlopen, vast + "/api/v0/instances/" + number + "/", order, head, None, False, "PUT")
  problem = "no answer from Vast: %s" % said
  if status:
    problem = "Vast answers HTTP %d, no success" % status
  try:
    if status == 200 and json.loads(said)["success"] is True:
      problem = "Vast took the order, but the instance still runs"
  except Exception:
    pass
def note(spent, since=None):
  told = {"at": now(), "spent": spent, "max_hours": now() + most - spent,
    "start_limit": since and since + limit, "attempts": tries, "problem": problem}
  for file in files:
    try:
      os.makedirs(os.path.dirname(file), exist_ok=True)
      with open(file + ".new", "w") as part:
        json.dump(told, part)
      os.replace(file + ".new", file)
      break
    except OSError:
      pass
spent, newest = 0.0, time.time() - 900
for file in files:
  try:
    if os.stat(file).st_mtime >= newest:
      newest, spent = os.stat(file).st_mtime, 0.0
      spent = min(max(0.0, float(json.load(open(file))["spent"])), most)
  except Exception:
    pass
last = alive = again = now()
tries, problem = 0, ""
local = web.build_opener(web.ProxyHandler({})).open
while key and number.isdigit() and (limit or most):
  spent += now() - last
  last = now()
  ask(local, "http://%s:%s/ready" % (host, get("PORT") or 8080))
  ready, why = status == 200, ""
  if ready:
    alive = now()
  elif limit and now() >= alive + limit:
    why = "no worker was ready for %g min (BARK_START_LIMIT)" % (limit / 60)
  if most and spent >= most:
    why = "BARK_MAX_HOURS are over"
  if not why:
    tries, problem = 0, ""
  elif now() >= again:
    print("bark-guard: stopping the instance:", why, flush=True)
    note(0)
    stop()
    tries += 1
    pause = min(600, 5 * 2 ** min(tries, 9))
    again = now() + pause
    print("bark-guard: %s; again in %d s; end the rent by hand:" % (problem, pause),
      "manage-bark-worker.sh stop", flush=True)
  note(spent, limit and not ready and alive)
  time.sleep(max(0.1, min(x / 20 for x in (limit, most, 200) if x)))
END
do sleep 5; done &
fi
'
readonly LOOP='while :; do
  python -u /app/bark-worker.py
  status=$?
  echo "bark-worker ended with status $status"
  case $status in 0 | 2) break ;; esac
  sleep 5
done &'
readonly ON_START="$TO_CONSOLE$WATCH$LOOP"

# -----------------------------------------------------------------------------
# Help

readonly USAGE="usage: $PROGRAM COMMAND [OPTIONS]

commands:
  start            rent a GPU, or wake the stopped one, and print the worker's address
  status           what is rented, what it costs, how the worker is
  test             speak one sentence and check the sound
  logs             what the worker prints
  stop             end the GPU's rent, keep disk and models
  destroy          end all of it
  search           the offers that start would consider
  ssh              a shell on the instance
  tunnel           reach the worker through SSH, encrypted
  open             its page in a browser here, through SSH
  speak            read a book or any other text into one sound file
  env              address and key for an application's .env
  endpoint         workers that Vast starts when requests come, and ends
  local            run a worker on this machine until Ctrl-C
  completion       tab completion for bash or zsh
  help [COMMAND]   show this, or one command's options

exit status: 0 ok, 1 unhealthy or answered with no, 2 wrong usage or configuration, 3 a tool or key
is missing (the message says how to get it), 4 Vast refused or has nothing that fits, 5 no instance,
6 time ran out, 129/130/143 ended by a signal

every command takes --help, and -v (or BARK_TRACE=1), which tells of each call to Vast or the worker
how long it took and what kind of answer came; --version tells the version

environment: VASTAI_API_KEY (or a key that \`vastai set api-key\` stored), BARK_LABEL (bark-worker),
BARK_IMAGE ($DEFAULT_IMAGE), BARK_POLL (seconds between looks, 5)"

readonly USAGE_SEARCH_OPTIONS="  --gpu NAMES            such as '3060,RTX 4060 Ti', or any
                         ($GPUS_OF_2020,
                         $GPUS_OF_2023)
  --min-vram GB          (8)
  --max-price DOLLARS    per hour, storage included (0.20)
  --max-traffic DOLLARS  per GB downloaded; the first start takes some $FIRST_START_GB GB (0.05)
  --min-reliability R    above this, 0 to 1 (0.95)
  --disk GB              (50)
  --region CODES         countries such as DE,FR, or EU (anywhere)
  --interruptible        cheaper, but whoever bids more takes the GPU away
  --bid DOLLARS          per hour, with --interruptible (a quarter above the lowest that wins)
  --any-machine          also those that failed here within a day
  --image IMAGE          ($DEFAULT_IMAGE)"

# In quotes with their names, by which `usage_of` finds them.
readonly "USAGE_start=usage: $PROGRAM start [ID] [OPTIONS]

Prints the address of a healthy worker. Where an instance labelled '$LABEL' runs, waits for it;
where one is stopped, starts it again; else rents the cheapest offer that fits, or of those within
10 % of its price the most reliable, after asking. What it rented and cannot bring to health it
gives back, then tries the next offer, $ATTEMPTS in all.

$USAGE_SEARCH_OPTIONS
  --model ID             suno/bark-small, builtin-voice, ... (suno/bark)
  --voice NAME           voice when a request names none (v2/en_speaker_6)
  --listen NAME          hear what was spoken, and speak again what has wrong words: tiny, base,
                         small, medium, each also as tiny.en for English alone, large-v3, or a hub
                         id of a Whisper; it runs on the CPU (off)
  --timeout SECONDS      for each instance to get healthy (1200)
  --idle-stop MINUTES    without speech, then the instance stops itself; 0: never (30)
  --max-hours HOURS      of the instance, then it stops itself; 0: never (0)
  --replace              if the stopped instance's GPU is taken or it fails, rent another, then
                         destroy it
  --dry-run              show the offer and its cost, rent nothing
  --yes                  do not ask, for scripts; needed to rent where no terminal is
  ID                     wait for, or wake, this one of several instances

So that nothing bills for nothing, an instance stops itself by these two, and also when no worker
is ready within $START_LIMIT minutes (BARK_START_LIMIT; 0: never), though whoever started it may be
gone. Then an application gets no connection until start wakes it. Its minutes count anew then, its
hours if it has rested for 15 minutes or stopped itself by them. Vast documents that an instance may
stop itself, but we have not tried it live yet: look at status.

Each order, to rent or to wake, and what came of it stands in a journal, without whose line none is
made: \${XDG_STATE_HOME:-~/.local/state}/bark-worker/orders.log. After a crash status tells what it
has open; a machine that failed by itself is left out for a day.

Settings of the worker in this environment go along:
$PASSED_ON;
BARK_MODEL, BARK_VOICE, BARK_LISTEN, BARK_IDLE_STOP, BARK_START_LIMIT and BARK_MAX_HOURS, where no
option says otherwise.

While an order is on its way, this machine's list of processes shows the worker's own key to others
who use it, as Vast's CLI takes it no other way; the account's key never shows."

readonly "USAGE_status=usage: $PROGRAM status [ID | --all] [--json]

Prints what is rented under the label '$LABEL' and how long the account's credit lasts; on
stderr of which orders the journal tells no end. Exit status 0 only if a worker is ready.

  --all     all of the account that bills, whatever its label, and what it costs; exit status 0 if
            Vast tells all of it
  --json    one object: {\"label\", \"instances\": [...], \"credit\"}, and \"unreadable\": [ids]
            of rows that cannot be read, if Vast has any; with --all {\"label\", \"billed\": [...],
            \"cost_per_hour\", \"cost_per_day\", \"without_price\": [ids], \"credit\"}
  ID        one of several instances"

readonly "USAGE_logs=usage: $PROGRAM logs [ID] [OPTIONS]

  -f, --follow    go on printing new lines until Ctrl-C
  -n, --tail N    the last N lines (1000)
  --daemon        what Vast's daemon says of the container instead
  ID              one of several instances"

readonly "USAGE_env=usage: $PROGRAM env [ID]

Prints BARK_URL and BARK_API_KEY of the instance for an application's .env, and VASTAI_ENDPOINT_ID
as it is set here: the number of an endpoint, which \`endpoint up\` prints.

  ID    one of several instances"

readonly "USAGE_stop=usage: $PROGRAM stop [ID] [--now]

Waits until the worker has nothing to do, at most $DRAIN_SECONDS s, then ends the GPU's rent. Disk
and models stay, and storage goes on costing; start wakes it again.

  --now    do not wait
  ID       one of several instances (all that are labelled '$LABEL')"

readonly "USAGE_destroy=usage: $PROGRAM destroy [ID] [--yes]

Destroys the instance with its disk, after asking. Nothing is billed any more.

  --yes    do not ask
  ID       one of several instances (all that are labelled '$LABEL')"

readonly "USAGE_help=usage: $PROGRAM help [COMMAND]"

# usage: usage_of COMMAND    (fails for one that there is not; of manage/'s, of those loaded)
usage_of() {
  local name="USAGE_$1"
  [[ "$1" =~ ^[a-z]+$ && -n "${!name:-}" ]] && printf '%s\n' "${!name}"
}

# -----------------------------------------------------------------------------
# Messages: stdout carries the answer, stderr everything else

line_open=''    # a progress line on the terminal waits to be overwritten

# Never fails: a reader that has left must not stop what gives money back.
say() {
  if [[ -n "$line_open" ]]; then printf '\n' >&2 || true; fi
  line_open=''
  printf '%s\n' "$*" >&2 || true
}

# Prints the answer. A reader who has left has what he wanted: that is no failure.
# In a shell of its own: a trap that runs in here would find stderr closed.
tell() { (printf '%s\n' "$*") 2>/dev/null || reader_left=yes; }

reader_left=''    # nobody reads stdout any more
leaving=''        # the status that this script ends with is its own, and no tool's

# usage: leave STATUS
leave() {
  leaving=yes
  exit "$1"
}

# usage: die STATUS MESSAGE
die() {
  say "$PROGRAM: $2"
  leave "$1"
}

# usage: usage_error MESSAGE COMMAND    (of an option that it begins with, also the line of help)
usage_error() {
  local line='' pattern=$'\n'"  (-., )?${1%% *}[ ,]"$'[^\n]*'
  if [[ "$1" == -* && "$(usage_of "$2")" =~ $pattern ]]; then line="${BASH_REMATCH[0]}"; fi
  die "$EX_USAGE" "$1$line"$'\n'"its help: $CALLED help $2"
}

# -----------------------------------------------------------------------------
# Loading: what has nothing to do with renting one machine lies in manage/, in a file a command

loaded=''    # the files that are loaded, by blanks; each adds its own name at its end

# usage: load COMMAND    (if it lies in a file of manage/; ends where that is missing)
load() {
  local part="$1"
  case "$1" in
    search | endpoint | local | test | speak | completion | hints | trace | account) ;;
    reach | ssh | tunnel | open) part=reach ;;
    *) return 0 ;;
  esac
  if is_loaded "$part"; then return 0; fi
  [[ -r "$ROOT/manage/$part.sh" ]] || die "$EX_MISSING" "manage/$part.sh is missing: the folder \
manage/ must lie beside this script, in $ROOT"
  # shellcheck source=/dev/null    # each of them follows this file instead
  source "$ROOT/manage/$part.sh"
}

# usage: can_load PART    (loads what the script can do without, if it is there)
can_load() { [[ -r "$ROOT/manage/$1.sh" ]] && load "$1"; }

is_loaded() { [[ " $loaded " == *" $1 "* ]]; }

# -----------------------------------------------------------------------------
# Time

readonly LONGEST_STEP=700    # seconds; a sentence may take 660
now=0             # seconds since the start, as `tick` counts them: by it goes all that waits
last_seconds=0

# SECONDS follows the wall clock: set back, it would make every wait as long; set forward, end it.
# So a step back, or one longer than anything here can take, counts as one second.
tick() {
  local step=$((SECONDS - last_seconds))
  last_seconds=$SECONDS
  if ((step < 0 || step > LONGEST_STEP)); then step=1; fi
  now=$((now + step))
}

# usage: pause SECONDS    (in steps, since a trap runs only between commands)
pause() {
  local left
  for ((left = $1; left > 0; left--)); do
    sleep 1 || true
    tick
    refresh_phase
  done
}

short_pause() {
  sleep 0.2 || true
  tick
}

# usage: until_true SECONDS PAUSE COMMAND...    (until it succeeds; fails once SECONDS are over)
# PAUSE is what lies between two tries, in seconds; 0 is a short one.
until_true() {
  local deadline between="$2"
  tick
  deadline=$((now + $1))
  shift 2
  until "$@"; do
    if ((now >= deadline)); then return 1; fi
    if ((between > 0)); then pause "$between"; else short_pause; fi
  done
}

# -----------------------------------------------------------------------------
# Options

operands=()         # the words beside options that the command was given
said_options=' '    # the names of the options, between blanks
target_id=''        # the instance that was named; without one, `chosen_row` or all are meant

# usage: read_options COMMAND SPEC WORDS...    (sets both of these, and the variables in SPEC)
# SPEC has --name:variable for an option that sets the variable to yes, --name=variable for one that
# gives it a value, and WORD if other words may stand among them. As two words counts --name=value.
# After -- come other words alone.
read_options() {
  local command="$1" spec=" ${2//$'\n'/} " word plain='' joined variable hint
  shift 2
  operands=() said_options=' '
  while (($#)); do
    word="$1" joined=''
    shift
    if [[ -z "$plain" && "$word" == --*=* ]]; then
      set -- "${word#*=}" "$@"
      word="${word%%=*}" joined=yes
    fi
    if [[ "$plain$word" == -- ]]; then
      plain=yes
    elif [[ -n "$plain" || "$word" != -* ]]; then
      [[ "$spec" == *' WORD '* ]] || refuse_word "$command" "$word"
      operands+=("$word")
    elif [[ "$word" != *' '* && "$spec" == *" $word"[:=]* ]]; then
      said_options="$said_options$word "
      variable="${spec#*" $word"[:=]}"
      variable="${variable%% *}"
      if [[ "$spec" == *" $word:"* ]]; then
        if [[ -n "$joined" ]]; then usage_error "$word takes no value" "${command%% *}"; fi
        printf -v "$variable" yes
      else
        if [[ -z "${1:-}" || "$1" == --* ]]; then
          usage_error "$word needs a value" "${command%% *}"
        fi
        printf -v "$variable" '%s' "$1"
        shift
      fi
    else
      hint=''
      if can_load hints; then hint="$(near_option "$word" "$spec")"; fi
      refuse_word "$command" "$word" "$hint"
    fi
  done
}

# usage: refuse_word COMMAND WORD [HINT]
refuse_word() {
  local hint="${3:-}"
  case "$1$hint" in test | 'endpoint test') hint='; a TEXT that begins so comes after --' ;; esac
  usage_error "$1 knows no '$2'$hint" "${1%% *}"
}

# usage: read_target COMMAND SPEC WORDS...    (read_options, with an ID among the words)
read_target() {
  local word
  read_options "$1" "WORD $2" "${@:3}"
  for word in ${operands[@]+"${operands[@]}"}; do
    [[ "$word" =~ ^[0-9]{1,15}$ && -z "$target_id" ]] ||
      refuse_word "$1" "$word" '; an ID is a number'
    target_id="$((10#$word))"
  done
}

is_said() { [[ "$said_options" == *" $1 "* ]]; }

# Prints a decimal number in millionths: 0.25 gives 250000.
millionths() {
  local whole="${1%%.*}" part=''
  if [[ "$1" == *.* ]]; then part="${1#*.}"; fi
  part="${part}000000"
  printf '%d\n' "$((10#${whole:-0} * 1000000 + 10#${part:0:6}))"
}

# usage: need_number COMMAND OPTION VALUE LOW HIGH    (decimals, the bounds included)
need_number() {
  local pattern='^([0-9]{1,6}([.][0-9]*)?|[.][0-9]+)$'
  if [[ ! "$3" =~ $pattern ]] || (($(millionths "$3") < $(millionths "$4"))) ||
    (($(millionths "$3") > $(millionths "$5"))); then
    usage_error "$2 is '$3'; it must be a number from $4 to $5" "$1"
  fi
}

agreed=''    # yes, if --yes was said

# usage: says_yes QUESTION    (asks a person at the terminal)
says_yes() {
  local answer=''
  printf '%s [y/N] ' "$1" >&2 || true
  read -r answer || true
  [[ "$answer" == [yY] || "$answer" == [yY]es ]]
}

# usage: need_yes DOING    (ends where nobody can be asked, unless --yes was said)
need_yes() {
  [[ -n "$agreed" || -t 0 ]] ||
    die "$EX_USAGE" "not $1 without being told to: this is no terminal, so say --yes"
}

# usage: foretell_yes WHAT_IS_NOT_DONE    (where it may turn out that nobody can be asked)
foretell_yes() {
  if [[ -z "$agreed" && ! -t 0 ]]; then say "this is no terminal: without --yes $1"; fi
}

# usage: agree QUESTION DOING DONE    (ends unless --yes was said or a person says yes)
agree() {
  need_yes "$2"
  if [[ -n "$agreed" ]]; then return 0; fi
  says_yes "$1" || die "$EX_UNHEALTHY" "nothing is $3"
}

# usage: need_whole COMMAND OPTION VALUE LOW HIGH
need_whole() {
  if [[ ! "$3" =~ ^[0-9]{1,6}$ ]] || ((10#$3 < $4 || 10#$3 > $5)); then
    usage_error "$2 is '$3'; it must be a whole number from $4 to $5" "$1"
  fi
}

# usage: need_plain COMMAND NAME VALUE
# Vast's CLI takes the instance's environment as one text and cannot quote in it.
need_plain() {
  [[ "$3" =~ ^[A-Za-z0-9._/:@+-]+$ ]] ||
    usage_error "$2 is '$3'; it may have letters, digits and . _ / : @ + - in it" "$1"
}

# Prints GPU names as Vast spells them, joined by commas; one in mixed case is taken as it is.
gpu_names() {
  local name all=''
  while IFS= read -r name; do
    if [[ ! ("$name" =~ [[:lower:]] && "$name" =~ [[:upper:]]) || "$name" == [RA][tn][xy]* ]]; then
      name="$(gpu_name "$name")"
    fi
    all="$all,$name"
  done < <(feed "$1" tr ',_' '\n ' | sed -E 's/^ +//; s/ +$//')
  printf '%s\n' "${all#,}"
}

# usage: gpu_name NAME    (rtx 3060 ti, 3060ti and RTX 3060 TI give RTX 3060 Ti)
gpu_name() {
  feed "$1" tr '[:lower:]' '[:upper:]' | sed -E 's/^([2-5]0[0-9]{2})/RTX \1/
    s/^(1[06][0-9]{2})/GTX \1/; s/^(A[2456][05]00)$/RTX \1/; s/([0-9]S?) ?TI$/\1 Ti/
    s/ ?LAPTOP$/ laptop/; s/^TESLA/Tesla/; s/^QUADRO/Quadro/; s/^TITAN (RTX|XP)$/Titan \1/'
}

# Prints country codes joined by commas; EU stands for its members.
region_codes() {
  local codes
  codes="$(feed "$1" tr '[:lower:]' '[:upper:]' | tr -d ' ')"
  [[ "$codes" =~ ^[A-Z]{2}(,[A-Z]{2})*$ ]] || return 1
  feed "$codes" sed -E 's/(^|,)EU(,|$)/\1AT,BE,BG,HR,CY,CZ,DK,EE,FI,FR,DE,GR,HU,IE,IT,'\
'LV,LT,LU,MT,NL,PL,PT,RO,SK,SI,ES,SE\2/'
}

# -----------------------------------------------------------------------------
# Adapters: the only functions that call vastai, curl or ssh

reply=''        # what the last question to Vast brought; set by its two adapters, hear_vast and web
complaint=''    # why it brought nothing; this and the next are set by `complain` alone
refused=''      # who said no: an HTTP status; `no` in an answer; `usage`, the CLI itself
calling=''      # the call that is under way
deferring=''    # yes while a signal has to wait; then
cut=''          # the exit status that it asks for
ending=''       # yes once `finish` has begun
call_end=''     # how it ended: exit status, a blank, and what the CLI said on stderr
scratch=''      # a folder that only this user can read
VASTAI=''       # the CLI
readonly RECORD=$'\036' LINE=$'\037'    # separate what a call printed

# usage: vast WORDS...    (sets reply, complaint, refused; fails if there is a complaint)
# The CLI's exit status is 0 also when Vast refuses. What it prints comes through a pipe and never a
# file: the disk may be full, or swept, just when something has to be given back.
vast() {
  space_calls "$1 $2"
  complain
  reply='' call_end='' calling="$1 $2"
  deferring=yes
  exec 9< <(run_vast "$@" 2>/dev/null)
  hear_vast
  deferring=''
  heed_signal
  [[ -z "$complaint" ]]
}

# Runs the CLI beside this script and deaf to signals: a trap here runs at once, and what is being
# ordered is not cut in the middle. Prints, when it has ended, two empty lines, one as call_end, and
# its answer.
run_vast() {
  local said errors what="vastai $1 $2"
  trap '' HUP INT TERM
  if [[ "${3:-}" =~ ^[0-9]+$ ]]; then what="$what $3"; fi    # of other words some are secrets
  traced "$what" call_cli "$@"
  printf '\n\n%s %s\n%s\n' "${said%% *}" "${errors//$'\n'/$LINE}" "${said#* }"
}

# Sets said, to exit status and answer, and errors of its caller.
call_cli() {
  local answer status=0
  said="$({
    answer="$("$VASTAI" "$@" --raw --retry 1 </dev/null 2>&4)" || status=$?
    printf '%s%s %s' "$RECORD" "$status" "$answer"
  } 4>&1)"
  errors="${said%%"$RECORD"*}"
  said="${said#*"$RECORD"}"
  if is_loaded trace; then kind="$(kind_of "${said%% *}" "$errors" "${said#* }")"; fi
}

# usage: traced WHAT COMMAND...    (under -v tells how long it took and what kind of answer came)
traced() {
  if is_loaded trace; then
    trace_call "$@" || return "$?"
  else
    "${@:2}" || return "$?"
  fi
}

# Waits for the call to end, or for a signal: then `finish_call` goes on where this stopped. Until
# it is heeded here, a signal waits: served inside `read`, or by the child just made, it would fork
# this script, with all that it knows of what is to be given back.
hear_vast() {
  local began=$SECONDS misses=0 said='137 killed'
  # Time that runs out may take away what `read` has by then: one of two empty lines, no more.
  while ! IFS= read -r -t 1 -u 9 && ((misses < 3)); do
    # Bash 3.2 has one status for time that ran out and for an end, which comes at once: the CLI was
    # killed. A signal may end `read` early, too.
    misses=$((SECONDS == began ? misses + 1 : 0))
    tick
    refresh_phase
    heed_signal
    began=$SECONDS
  done
  if ((misses < 3)); then said="$(trap '' HUP INT TERM; cat <&9)"; fi
  said="${said#$'\n'}"
  call_end="${said%%$'\n'*}" reply="${said#*$'\n'}" calling=''    # one command: no signal splits it
  if [[ "$reply" == "$call_end" ]]; then reply=''; fi
  exec 9</dev/null
  tick
  note_call
  read_reply
}

# Waits for a call that a signal broke in on, unless it only asks.
finish_call() {
  case "$calling" in
    '') ;;
    show\ * | search\ * | logs\ *) calling=''; note_call ;;
    *)
      say "waiting for Vast's answer to '$calling', which is under way: $CALL_SECONDS s at most"
      hear_vast ;;
  esac
}

called=''                                               # the last call
last_look=-99 last_change=-99 last_order=-99 last_destroy=-99    # when Vast was last asked, in s

# usage: space_calls 'VERB OBJECT'    (keeps the least time between calls that Vast asks for)
# Whole seconds are counted: a difference of n + 1 means that more than n have passed.
space_calls() {
  called="$1"
  case "$1" in
    'show instances') until tick && ((now - last_look > 1)); do pause 1; done ;;
    'create instance') until tick && ((now - last_order > 5)); do pause 1; done ;;
    'destroy instance') until tick && ((now - last_destroy > 3)); do pause 1; done ;;
    'start instance' | 'stop instance') until tick && ((now - last_change > 1)); do pause 1; done ;;
  esac
}

note_call() {
  case "$called" in
    'show instances') last_look=$now ;;
    'create instance') last_order=$now ;;
    'destroy instance') last_destroy=$now ;;
    'start instance' | 'stop instance') last_change=$now ;;
  esac
}

# usage: complain [MESSAGE [WHO]]    (without a message there is nothing to complain of)
complain() { complaint="${1:-}" refused="${2:-}"; }

# Complains if there is reason to; an error of Vast is a JSON object on stderr, under --raw. A wrong
# key may come as 404. 2 comes from the CLI itself: it does not know an option, as another version
# may.
read_reply() {
  local status="${call_end%% *}" errors="${call_end#* }" said line who=''
  complain
  if [[ -z "$errors" && "$status" == 0 ]]; then return 0; fi
  errors="${errors//$LINE/$'\n'}"
  said="$(feed "$errors" jq -Rr 'fromjson? | objects | select(.error == true)
    | (.msg // "no reason given" | tostring | gsub("\\s+"; " ")) as $msg
    | (if .status_code == 404 and ($msg | test("auth|key|log in"; "i")) then 401
       else .status_code end) as $means
    | "\($means)|Vast says: \($msg) (HTTP \(.status_code))"' | tail -n 1)"
  if [[ -n "$said" ]]; then
    complain "${said#*|}" "${said%%|*}"
    return 0
  fi
  if [[ "$status" == 0 ]]; then return 0; fi
  if [[ "$status" == 2 ]]; then who=usage; fi
  line="$(feed "$errors" grep -v '^ *$' | tail -n 1)" || true
  case "$line" in
    *InvalidHeader* | *UnicodeEncodeError*) line='the API key has characters that no key has' ;;
    *ConnectionError* | *Timeout*) line='no connection to Vast, or none that lasted' ;;
  esac
  complain "vastai failed ($status): ${line:0:200}" "$who"
}

# usage: vast_json object|array WORDS...    (fails too unless the reply is one)
vast_json() {
  vast "${@:2}" || return 1
  if reply_is "$1"; then return 0; fi
  no_answer
  return 1
}

# usage: reply_is object|array
reply_is() { [[ "$(feed "$reply" jq -r type 2>/dev/null)" == "$1" ]]; }

# usage: no_answer [DETAIL]    (an answer that is not what was asked for is none)
no_answer() { complain "Vast answered, but not what was asked for${1:-}" "$refused"; }

# usage: persist CALL...    (up to three times, so it changes nothing, or only once)
persist() {
  local attempt step
  for attempt in 1 2 3; do
    if "$@"; then return 0; fi
    case "$refused" in
      400 | 401 | 403 | 404 | usage) return 1 ;;
      429) step=10 ;;
      *) step=2 ;;
    esac
    if [[ "$complaint" == *'Resets at'* ]]; then return 1; fi    # the day's searches are used up
    if ((attempt < 3)); then pause "$((attempt * step))"; fi
  done
  return 1
}

# usage: die_by_vast WHAT_FAILED
die_by_vast() {
  local hint=''
  case "$refused" in
    usage) die "$EX_MISSING" "$1: this is not vastai $VASTAI_VERSION: $complaint" ;;
    401) hint='; is VASTAI_API_KEY one of https://cloud.vast.ai/manage-keys/ ?' ;;
    '') hint='; what is rented goes on being billed: https://cloud.vast.ai/instances/' ;;
    403) hint='; the key needs the permissions misc, user_read, instance_read and instance_write,
and user_write for an endpoint' ;;
  esac
  die "$EX_REFUSED" "$1: $complaint$hint"
}

# usage: call_url KEY URL JSON CURL_OPTIONS...    (KEY and JSON may be empty; JSON is for POST)
# Neither of the three, each of which may hold a secret, stands in a list of processes or in a file.
# CURL_OPTIONS have it write the HTTP status at the end, first in its line.
call_url() {
  local sent='' status=0
  traced "${2%%\?*}" send_url "$@" || status=$?
  printf '%s\n' "$sent"
  return "$status"
}

# usage: send_url AS_CALL_URL...    (sets sent of its caller to what came)
send_url() {
  sent="$(key="$1" url="$2" feed "$3" jq -Rr '"url = \(env.url | tojson)",
    (env.key | select(. != "") | "header = \("Authorization: Bearer " + . | tojson)"),
    (select(. != "") | "header = \"Content-Type: application/json\"", "data-binary = \(tojson)")' |
    curl -sS -K - "${@:4}")" || return "$?"
  if is_loaded trace; then
    kind="${sent##*$'\n'}"
    kind="HTTP ${kind%% *}"
  fi
}

# Prints the worker's health as JSON; fails if there is no answer that is one.
health_of() {
  local health
  health="$(traced "$1/health" curl -s --max-time 5 "$1/health")" && [[ -n "$health" ]] || return 1
  feed "$health" jq -ce 'objects | select(.status | strings)' 2>/dev/null
}

# Prints the names of GPUs that Vast knows, as JSON; fails if it does not tell. This needs no key.
known_gpus() {
  local names
  local url="$CONSOLE_URL/api/v0/gpu_names/unique/"
  names="$(traced "$url" curl -sS --max-time 15 "$url" 2>/dev/null)" || return 1
  feed "$names" jq -ce '.gpu_names | arrays | map(strings) | select(. != [])' 2>/dev/null
}

has_tool() { command -v "$1" >/dev/null 2>&1; }

# Finds the command; fails if it is neither on PATH nor in .venv.
find_vastai() {
  VASTAI="$(command -v vastai 2>/dev/null)" || VASTAI="$VENV/bin/vastai"
  [[ -x "$VASTAI" ]]
}

# Where vastai is missing, asks a person whether to install it. Only commands that order something
# new call this: what ends a rent at night must not wait for pip.
offer_vastai() {
  if find_vastai || [[ ! -t 0 || ! -f "$ROOT/requirements.txt" ]]; then return 0; fi
  if can_load local && says_yes 'vastai is missing: install it into .venv (32 packages, borb among'\
' them under the AGPL)?'; then
    install_part renting vastai
  fi    # else `require_tools` says what to do
}

# Fails unless every tool is there; names each one that is not.
require_tools() {
  local missing='' tool
  for tool in curl jq; do
    if ! has_tool "$tool"; then
      missing="$missing
  $tool: sudo apt install $tool, or brew install $tool"
    fi
  done
  find_vastai || missing="$missing
  vastai: python3 -m venv .venv && .venv/bin/pip install vastai==$VASTAI_VERSION
    (beside this script; or anywhere on PATH)"
  if [[ -n "$missing" ]]; then die "$EX_MISSING" "missing, and how to get it:$missing"; fi
}

# usage: xdg_folder VALUE USUAL    (prints the one meant; for XDG a relative VALUE is none)
xdg_folder() {
  local folder=~/"$2"    # without HOME, as for a timer of systemd, that of this user
  if [[ "$1" == /* ]]; then folder="$1"; fi
  printf '%s\n' "$folder"
}

# Prints the file in which `vastai` keeps the account's key; nothing if it has none.
key_file() {
  local stored file
  stored="$(xdg_folder "${XDG_CONFIG_HOME:-}" .config)/vastai"
  for file in "$stored/vast_tfa_key" "$stored/vast_api_key" ~/.vast_api_key; do
    if [[ -s "$file" ]]; then
      printf '%s\n' "$file"
      return 0
    fi
  done
}

# Finds the account's key. The CLI reads VAST_API_KEY, and takes an empty one for a key.
require_key() {
  export VAST_API_KEY="${VASTAI_API_KEY:-${VAST_API_KEY:-}}"
  if [[ -z "$VAST_API_KEY" ]]; then
    unset VAST_API_KEY
    [[ -n "$(key_file)" ]] ||
      die "$EX_MISSING" 'no Vast API key: make one at https://cloud.vast.ai/manage-keys/, then
  export VASTAI_API_KEY=...   (or: vastai set api-key ...)'
  elif [[ ! "$VAST_API_KEY" =~ ^[A-Za-z0-9._~+/=-]+$ ]]; then
    die "$EX_MISSING" 'VASTAI_API_KEY has characters that no key has; was it copied alone?'
  fi
}

# What every command needs that talks to Vast.
open_account() {
  [[ "$LABEL" =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] ||
    die "$EX_USAGE" "BARK_LABEL is '$LABEL'; it may have letters, digits and . _ - in it"
  [[ "$POLL" =~ ^[1-9][0-9]{0,3}$ ]] ||
    die "$EX_USAGE" "BARK_POLL is '$POLL'; it must be a whole number of seconds, 1 to 9999"
  require_tools
  require_key
  guard
}

# Makes the folder for what has to be a file: a sound, a request, a log that is followed.
make_scratch() {
  if [[ -n "$scratch" ]]; then return 0; fi
  scratch="$(umask 077 && mktemp -d "${TMPDIR:-/tmp}/bark-worker.XXXXXX")" ||
    die "$EX_MISSING" "no folder for files on their way can be made in ${TMPDIR:-/tmp}"
}

# -----------------------------------------------------------------------------
# Facts: what jq makes of Vast's rows. Prices are dollars per hour.

readonly JQ_DEFS='
def clean: (. // "") | tostring | gsub("[\\s|]+"; " ") | ltrimstr(" ") | rtrimstr(" ");
def fixed($places): ((. * pow(10; $places)) | round | tostring) as $digits
  | (if ($digits | length) > $places then $digits
     else "0" * ($places + 1 - ($digits | length)) + $digits end)
  | .[:-$places] + "." + .[-$places:];
def is_one_of($list): . as $one | any($list[]; . == $one);

# extra_env is a list of pairs, or of nothing while the instance is being made.
def environment: (.extra_env // []) | if type == "array"
  then map(select(type == "array") | {key: .[0], value: .[1]}) | from_entries else . end;
def storage: .storage_total_cost // (if .storage_cost and .disk_space
  then .storage_cost * .disk_space / (env.month_hours | tonumber) else null end);

# What Vast or Docker says, without the name and tag of the image, in which any word may stand.
def image_names: (.image_uuid | strings | split("@")[0]) as $image
  | ($image | sub(":[^/:]*$"; "")) as $name
  | [$image, $name, ($name | sub("^[^/]*[.:][^/]*/"; "")), ($name | split("/") | last),
     ($image[($name | length) + 1:])] | map(select(. != ""));
def said: reduce image_names[] as $name ((.status_msg | clean); gsub("(?<![A-Za-z0-9])"
    + ($name | gsub("(?<c>[.])"; "[\(.c)]")) + "(?![A-Za-z0-9_])"; ""));
def complains: said | test("(errors?|fail|failed|failures?|exceptions?|traceback|denied"
  + "|unauthorized|manifest unknown|not found|no space left)([^a-z]|$)"; "i");
# A message longer than this loses its middle: its end tells the cause.
def shortened: if length > 400 then .[:100] + " ... " + .[-290:] else . end;
def state: (.actual_status // "") as $actual
  | (.intended_status // .cur_state // "running") as $wanted
  | if $actual | is_one_of(["offline", "unknown"]) then $actual
    elif $wanted == "stopped" then
      if $actual | is_one_of(["running", "loading", "rebooting"]) then "stopping" else "stopped" end
    elif $actual | is_one_of(["running", "frozen", "scheduling"]) then $actual
    elif complains then "error"
    elif $actual | is_one_of(["stopped", "exited"]) then
      if .is_bid then "outbid" else "exited" end
    elif $actual == "" then "provisioning" else "loading" end;
def mapped($port): [(.ports | objects)[$port] | arrays | .[0].HostPort?] | .[0] | clean;
def blotted($key): if $key == "" then . else split($key) | join("[key]") end
  | gsub("(?<name>[A-Z0-9_]*(KEY|TOKEN|SECRET|PASSWORD)[A-Z0-9_]*=)[^ ]+"; "\(.name)[key]");
def instance: (environment.BARK_API_KEY // "") as $key
  | {id, state: state, message: (.status_msg | clean | blotted($key) | shortened),
    said: said,
    gpu: ("\(.num_gpus // 1)x \(.gpu_name | clean)" | ltrimstr("1x ")),
    region: (.geolocation | clean),
    price: .dph_total, storage: storage, interruptible: (.is_bid // false), machine: .machine_id,
    started: .start_date, wanted: (.intended_status // ""),
    known: (.extra_env != null), key: $key}
  + {armed: (environment | {idle_stop: (.BARK_IDLE_STOP | tonumber? // 0),
      start_limit: (.BARK_START_LIMIT | tonumber? // 0),
      max_hours: (.BARK_MAX_HOURS | tonumber? // 0)})}
  + (mapped("\(env.worker_port)/tcp") as $port | (.public_ipaddr | clean) as $host
    | {address: (if state == "running" and $port != "" and $host != ""
         then "http://\($host):\($port)" else "" end)})
  + {ssh: [(mapped("22/tcp") as $port | select($port != "" and .public_ipaddr)
        | "\(.public_ipaddr | clean) \($port) direct"),
      (select((.ssh_host | clean) != "" and .ssh_port)
        | "\(.ssh_host | clean) \(.ssh_port | clean) proxy")]};

# What of a row cannot be read, in words; nothing if all can. Values stay out: they may be secrets.
def kinds: {id: "number", label: "string", actual_status: "string", intended_status: "string",
  cur_state: "string", dph_total: "number", storage_total_cost: "number", storage_cost: "number",
  disk_space: "number", num_gpus: "number", start_date: "number", is_bid: "boolean"};
def is_environment: type == "object" or type == "null" or (type == "array"
  and all(.[]; . == null or (type == "array" and length == 2 and (.[0] | type) == "string")));
def oddity: if type != "object" then "it is no object" else . as $row
  | [if .id == null then "it has no id" else empty end,
     (kinds | to_entries[] | select($row[.key] != null and ($row[.key] | type) != .value)
       | "its \(.key) is no \(.value)"),
     if .extra_env | is_environment then empty else "its extra_env is no environment" end,
     try (instance | empty) catch "it is of another shape"] | .[0] // "" end;
def odd_row: {id: ([objects | .id | numbers][0]), why: oddity, state: "unreadable", known: false,
  key: "", gpu: "unknown GPU", region: "", price: null, storage: null};
def may_be_ours: (objects | .label | strings) // env.our_label | . == env.our_label;
def is_before: "\(.id)" | is_one_of(env.before | split(" "));
def state_is_live: .state | is_one_of(["running", "loading", "provisioning", "rebooting"]);
# An instance that this run ordered; the one of another start that came first.
def is_own: .key != "" and .key == env.key;
def is_rival: .known and .key != env.key and .id < (env.rented | tonumber) and (is_before | not)
  and (state_is_live or .state == "scheduling");
def hours: if .started then [(now - .started) / 3600, 0] | max else null end;
# What it costs now: its storage alone while it sleeps. Of what is not known nothing is said.
def sleeps: .state | is_one_of(["stopped", "outbid"]);
def costs_now: if sleeps then .storage else .price end;
def known($before): if . then "\($before)\(fixed(4)) $/h" else "" end;
def with_credit: if (env.credit // "") == "" then . else .credit = (env.credit | tonumber) end;

# Of the journal: the time of a line; the orders of which no line tells how they ended, and the row
# of one; the machines that failed within a day; the seconds that an instance is known to have
# slept, up to now if it sleeps.
def at: .time | try fromdateiso8601 catch 0;
def open_orders: reduce .[] as $line ({}; ($line.order | tostring) as $order
  | if $line.event | is_one_of(["order", "wake"]) then .[$order] = $line
    elif $line.event | is_one_of(["rented", "unanswered"]) then
      if .[$order] then .[$order] += {id: $line.id} else . end
    elif $line.event
      | is_one_of(["ready", "refused", "nothing", "destroyed", "stopped", "gone"]) then
      with_entries(select(.key != $order and (.value.id == null or .value.id != $line.id)))
    else . end) | [.[] | select(.label == env.our_label)];
def failed_machines: map(select(.event == "failed" and .machine and (now - at | fabs) < 86400)
  | .machine) | unique;
def slept($id; $sleeps): reduce (.[] | select(.id == $id)) as $line ({seconds: 0, since: null};
    if $line.event == "stopped" then .since = (.since // ($line | at))
    elif $line.event == "wake" and .since then
      {seconds: (.seconds + ($line | at) - .since), since: null}
    else . end)
  | .seconds + if .since and $sleeps then now - .since else 0 end;
def of_the_journal($rows): .id as $id | .machine as $machine | at as $at
  | [$rows[] | select(.id == $id or ($id == null and $machine and .machine == $machine
      and (.started // now) > $at - 600))][0];

# Of a row and the health of its worker.
def visible: .[1] as $health | .[0]
  | ([(env.slept // "0" | tonumber) / 3600, hours // 0] | min) as $slept
  | {id, state, gpu, region, address, interruptible,
  price_per_hour: .price, storage_per_hour: .storage, hours: hours,
  cost_at_most: (if hours and .price
    then hours * .price - $slept * (.price - (.storage // .price)) else null end),
  message, armed, health: $health};

def span: if . < 1 then "\(. * 60 | floor) min" else "\(fixed(1)) h" end;
def costs: .storage_per_hour as $storage
  | [(if sleeps then
       ($storage | known("now ")
           + if . then " for storage (\(. * 24 | fixed(2)) $ a day)" else "" end)
         + (.price_per_hour | known(", ") + if . then " when it runs" else "" end)
     else (.price_per_hour | known("")) + ($storage | known(", of it ")
       + if . then " for storage, which goes on when stopped" else "" end) end),
     (if .interruptible then "interruptible" else "" end),
     (if .hours then "rented \(.hours | span) ago" else "" end)
       + (if .cost_at_most then ", at most \(.cost_at_most | fixed(4)) $ since" else "" end)]
  | map(select(. != "")) | join("; ");

# By what it stops itself, with the time left if the worker tells it.
def by_guard($name; $what): .armed[$name] as $limit
  | ([.health.guard[$name].left? | numbers][0]) as $left
  | if $limit > 0 then "\($limit) \($what)\(if $left then " (\($left / 3600 | span) left)"
    else "" end)" else empty end;
def guards: [by_guard("idle_stop"; "min without speech"),
    by_guard("start_limit"; "min without a worker that is ready"),
    by_guard("max_hours"; "h in all")] | join(", ")
  | if . == "" then "" else "\n  stops itself after " + . end;
def guards_fault: [.health.guard.error? | strings | "\n  cannot stop itself: " + clean][0] // "";
def worker: .health | "\(.status), \(.queue.running // 0) running, \(.queue.waiting // 0) waiting,"
  + " up \((.uptime // 0) / 3600 | span), \(.model_id // "")"
  + if .error then ": \(.error)" else "" end;

# The bid that an offer would be rented with, and what it then costs in all.
def bid: if env.interruptible == "" then null elif env.bid != "" then env.bid | tonumber
  else (.min_bid // 0) * 1.25 * 10000 | ceil / 10000 end;
def offer: bid as $bid | ($bid == null or $bid >= .min_bid) as $winning | {id,
    gpu: (.gpu_name | clean), vram: ((.gpu_ram // 0) / 1024), region: (.geolocation | clean),
    reliability: (.reliability2 // .reliability // 0), down: (.inet_down // 0),
    traffic: (.inet_down_cost // 0),
    first: ((.inet_down_cost // 0) * (env.first_start | tonumber)),
    bid: $bid, min_bid: (.min_bid // 0), winning: $winning,
    machine: .machine_id,
    cost: (if $bid and $winning then .dph_total - .min_bid + $bid else .dph_total end),
    storage: ((.storage_cost // 0) * (env.disk | tonumber) / (env.month_hours | tonumber))};
# The cheapest first, but of those within 10 % of it the most reliable; then the rest likewise. In
# the choice, the traffic of the first start counts as if spread over a day.
def ranked: map(.in_all = .cost + .first / 24) | sort_by(.in_all) | if . == [] then [] else
  (.[0].in_all * 1.1) as $near | (map(select(.in_all <= $near)) | sort_by(-.reliability, .in_all))
    + (map(select(.in_all > $near)) | ranked) end;
# A row that is not as Vast has them is no offer.
def offers: map(select((objects | .dph_total | numbers) and (env.interruptible == "" or .min_bid))
  | (try offer catch empty) | select([.id, .vram, .reliability, .down, .first, .cost, .storage]
    | all(type == "number" and . >= 0))) | ranked;
def sentence: "\(.gpu), \(.vram | round) GB, \(.region): \(.cost | fixed(4)) $/h"
  + " (\(.cost * 24 | fixed(2)) $ a day)";

# How Vast, which knows these names, spells those that a person typed, by commas; and the first
# that it does not know, with what comes nearest. Case, blanks, the family and how "super" is
# written make no difference.
def gpu_key: ascii_downcase | gsub("nvidia|geforce|[^a-z0-9]"; "") | gsub("super"; "s")
  | sub("tis$"; "sti") | sub("^(rtx|gtx|qrtx|tesla|quadro|titan)(?=.)"; "");
def shared($other): . as $one | [range(1; length + 1) | select($one[:.] == $other[:.])] | length;
def near($key): map(select(gpu_key | shared($key) > 0))
  | sort_by(gpu_key | [-shared($key), (length - ($key | length) | fabs)]) | .[:3];
def alike($one): if any(.[]; . == $one) then $one
  else ($one | gpu_key) as $key | map(select(gpu_key == $key)) | join(",") end;
def matched($typed): [alike($typed | split(",")[])] | join(",");
def unmatched($typed): . as $known | first($typed | split(",")[] | select(. as $one
    | $known | alike($one) == "")) | "\(.)|" + (gpu_key as $key | $known | near($key) | join(", "));
'

# usage: feed TEXT COMMAND...    (on its stdin, by a pipe: old shells make a file of <<<)
feed() { printf '%s\n' "$1" | "${@:2}"; }

# usage: unpack LINE NAMES...    (sets each variable to the next of the line's parts between bars)
# Not `read`: from a process substitution it would hand a signal that is being served to a child.
unpack() {
  local unpacked="$1|" name
  for name in "${@:2}"; do
    printf -v "$name" '%s' "${unpacked%%|*}"
    unpacked="${unpacked#*|}"
  done
}

# usage: facts FILTER [JQ_OPTIONS]    (of the JSON on stdin)
# Values go through the environment: what stands in argv, everybody on this machine may read.
facts() {
  our_label="$LABEL" worker_port="$WORKER_PORT" month_hours="$HOURS_A_MONTH" gpus="$gpus" \
    min_vram="$min_vram" max_price="$max_price" max_traffic="$max_traffic" \
    first_start="$FIRST_START_GB" min_reliability="$min_reliability" region="$region" \
    interruptible="$interruptible" bid="$bid" disk="$disk" jq -r "${@:2}" "$JQ_DEFS $1"
}

# usage: fact ROW FILTER    (of one instance or offer)
fact() { feed "$1" facts "$2"; }

# -----------------------------------------------------------------------------
# Instances: what Vast lists under our label

instances='[]'    # as the last look found them, by id; it holds the workers' keys
odd_rows='[]'     # those that cannot be read, of which one may be ours
pages=''          # what Vast lists, a page a line

# usage: list_instances OPTIONS...    (sets pages; fails, with a complaint, if Vast does not answer)
# `--limit` because without it one row that is still being made breaks the whole list.
list_instances() {
  local token='' last page
  pages=''
  while :; do
    vast show instances "$@" --limit 25 ${token:+--next-token "$token"} || return 1
    last="$token"
    page="$(reply_says 'select(.success != false and (.instances | type) == "array")
      | "page \(.next_token // "")", tojson')"
    token="${page%%$'\n'*}"
    if [[ "$token" != page\ * || "$token" == "page ${last:-none}" ]]; then
      no_answer
      return 1
    fi
    token="${token#page }"
    pages="$pages${page#*$'\n'}"$'\n'
    if [[ -z "$token" ]]; then return 0; fi
    pause 1
  done
}

# Fails, with a complaint, if Vast does not answer.
look() {
  local rows
  list_instances --label "$LABEL" || return 1
  if ! rows="$(listed_rows 'map(if oddity == "" then select(.label == env.our_label) | instance
        else select(may_be_ours) | odd_row end)
      | (map(select(.state != "unreadable")) | unique_by(.id)), map(select(.state == "unreadable"))'
    )"; then
    no_answer
    return 1
  fi
  instances="${rows%%$'\n'*}" odd_rows="${rows#*$'\n'}"
}

# usage: listed_rows FILTER [DEFINITIONS]    (of the rows in all pages, as one list)
listed_rows() { printf '%s' "$pages" | facts "${2:-} map(.instances[]) | $1" -cs; }

look_or_die() { persist look || die_by_vast 'the instances cannot be listed'; }

# usage: row_of ID    (prints its row; nothing if there is none that can be read)
row_of() { feed "$instances" facts ".[] | select(.id == $1) | tojson"; }

# Prints the rows of the last look, also those that cannot be read.
all_rows() {
  if [[ "$odd_rows" == '[]' ]]; then
    printf '%s\n' "$instances"
  else
    printf '%s\n' "$instances" "$odd_rows" | jq -cs add
  fi
}

# usage: is_absent ID    (from the last look, also from the rows that cannot be read)
is_absent() { [[ "$(all_rows | facts "any(.[]; .id == $1)")" == false ]]; }

# Says of each row that cannot be read what ends it; fails if there is none.
say_odd_rows() {
  if [[ "$odd_rows" == '[]' ]]; then return 1; fi
  say "$(destroy="$(by_hand destroy instance)" feed "$odd_rows" facts '.[]
    | "instance \(.id // "without an id") may be ours, but Vast\u0027s row of it cannot be read:"
      + " \(.why); this ends it: \(env.destroy) \(.id // "ID") -y"')"
}

# Sets targets of its caller to the rows, a line each, that target_id means, or without it all that
# can be read. They may be none only if it was not given.
find_targets() {
  open_account
  look_or_die
  targets="$(feed "$instances" facts '.[] | tojson')"
  if [[ -z "$target_id" ]]; then return 0; fi
  targets="$(all_rows | facts ".[] | select(.id == $target_id) | tojson")"
  if [[ -n "$targets" ]]; then return 0; fi
  if [[ "$instances" == '[]' ]]; then no_instance; fi
  die "$EX_NO_INSTANCE" "no instance $target_id is labelled '$LABEL'; those that are: $(all_rows |
    facts 'map(.id // empty | tostring) | join(", ")')"
}

# usage: chosen_row TARGETS    (prints the one to use: one that runs before one that sleeps)
chosen_row() {
  feed "$1" facts 'def rank: {running: 0, loading: 1, provisioning: 1,
      rebooting: 1, scheduling: 2, stopped: 3, stopping: 3, outbid: 4}[.state] // 5;
    if length == 0 then empty else min_by([rank, .id]) | tojson end' -s
}

# usage: no_instance [WHAT_ELSE]    (ends; `status` has looked what else may have that name)
no_instance() {
  if say_odd_rows; then die "$EX_UNHEALTHY" "no instance labelled '$LABEL' that can be read"; fi
  die "$EX_NO_INSTANCE" "no instance labelled '$LABEL'; ${1:-an endpoint of that name was not\
 looked at: $AGAIN endpoint status}
To rent one: $AGAIN start; whatever else the account has: $(by_hand show instances)"
}

# Sets row to the one that is meant; ends if there is none.
need_instance() {
  local targets
  find_targets
  row="$(chosen_row "$targets")"
  [[ -n "$row" ]] || no_instance
}

# Sets row and address to those of an instance that can be called.
find_running() {
  need_instance
  address="$(fact "$row" .address)"
  if [[ -n "$address" ]]; then return 0; fi
  die "$EX_UNHEALTHY" "$(fact "$row" '"instance \(.id) cannot be called: it is \(.state)"
    + if .message then " (\(.message))" else "" end'); run: $AGAIN start${target_id:+ $target_id}"
}

# -----------------------------------------------------------------------------
# The journal: what was ordered and what came of it, a line each. A record, never the authority

order_note='{}'    # what the lines of the order under way have in common

# Prints the folder of what outlives a run.
state_folder() { printf '%s/bark-worker\n' "$(xdg_folder "${XDG_STATE_HOME:-}" .local/state)"; }

# usage: note EVENT [ID]    (fails if the line cannot be written; only an order minds)
note() {
  local folder file line
  folder="$(state_folder)" file="$folder/orders.log"
  line="$(event="$1" id="${2:-}" feed "$order_note" facts '{time: (now | todate), event: env.event}
    + . + if env.id == "" then {} else {id: (env.id | tonumber)} end | tojson')" || return 1
  case "$1" in ready | refused | nothing | destroyed | stopped | gone) order_note='{}' ;; esac
  (
    umask 077
    mkdir -p "$folder" && chmod 700 "$folder" || exit 1
    if [[ -e "$file" || -L "$file" ]]; then
      [[ -f "$file" && -O "$file" ]] || exit 1    # what is no file of this user's may be a trap
      if (($(wc -c <"$file") > JOURNAL_BYTES)); then mv "$file" "$file.old" || exit 1; fi
    fi
    printf '%s\n' "$line" >>"$file" && chmod 600 "$file" || exit 1    # one write, so that none mix
    case "$1" in order | wake) sync "$file" || true ;; esac    # so that it outlives a power cut
  ) 2>/dev/null
}

# usage: note_order EVENT ROW FILTER [ID]    (ends if the line cannot be written)
note_order() {
  order_note="$(order="$$" fact "$2" "{order: \"\(now | floor).\(env.order)\"} + $3
    + {label: env.our_label} | tojson")"
  note "$1" "${4:-}" || die "$EX_MISSING" "nothing is ordered, as the journal \
$(state_folder)/orders.log cannot be written: it has to be a file in a folder of your own, and the \
disk must not be full; XDG_STATE_HOME names another place. $(what_is_left)"
}

# usage: journal FILTER    (of its lines, as one list; what is none is left out)
# A line may follow what is left of one that was cut, with nothing or NUL bytes between.
journal() {
  local folder file
  folder="$(state_folder)"
  for file in "$folder/orders.log.old" "$folder/orders.log"; do
    if [[ -f "$file" && -r "$file" ]]; then tail -c "$((2 * JOURNAL_BYTES))" "$file"; fi
  done | facts "[inputs | (split(\"{\") | last | \"{\" + . | fromjson?) | objects] | $1" -Rn
}

# Says of each order of which the journal does not tell the end, unless Vast's list has it as ended.
say_open_orders() {
  local open
  open="$(rows="$(all_rows)" end="$(by_hand destroy instance)" list="$(by_hand show instances)" \
    journal '(env.rows | fromjson) as $rows | open_orders[] | of_the_journal($rows) as $row
    | if $row.state == "stopped" then empty
      elif $row then "instance \($row.id) was ordered at \(.time), and the journal does not tell"
        + " that this start came to its end; if none waits for it, this ends it: \(env.end)"
        + " \($row.id) -y"
      elif .id == null and now - at < 86400 then "of the order of offer \(.offer) at \(.time) the"
        + " journal tells no answer, and Vast lists nothing of it under this label; look once:"
        + " \(env.list)" else empty end' 2>/dev/null)" || return 0
  if [[ -n "$open" ]]; then say "$open"; fi
}

# -----------------------------------------------------------------------------
# Giving back: whatever ends this script, nothing that it rented or woke stays billed unnoticed

run_key=''       # drawn by this run; every instance whose worker has it is this run's
before=''        # the ids that were there before, by blanks
rented_id=''     # the instance of the last order, until it is healthy or gone
open_order=''    # yes while an order has no clear answer: it may have brought an instance
order_time=0     # when the last one's call had ended
ordering=''      # yes while one is on its way
woken_id=''      # the stopped instance that this run started
if_cut=''        # the last word if a signal ends the run

# From here on, whatever ends this script ends its child and gives back.
guard() {
  exec 9</dev/null    # what `hear_vast` reads, where a signal comes before there is a call
  trap 'end_by_itself "$?"' EXIT
  trap 'on_signal 129' HUP
  trap 'on_signal 130' INT
  trap 'on_signal 143' TERM
}

# usage: on_signal STATUS
on_signal() {
  if [[ -n "$deferring" ]]; then cut="$1"; else end_by_signal "$1"; fi
}

heed_signal() {
  if [[ -n "$cut" && -z "$ending" ]]; then end_by_signal "$cut"; fi
}

# Under a trap a bare `return` tells the status from before the trap (bash 4.4 and later), so that
# every `return` in this file names its own.
end_by_signal() {
  finish
  if [[ -n "$if_cut" ]]; then say "$if_cut"; fi
  trap - EXIT
  exit "$1"
}

# usage: end_by_itself STATUS    (if a command in this script failed that must not, it is a tool's)
end_by_itself() {
  finish
  if [[ -z "$leaving" && ! "$1" =~ ^(0|129|130|143)$ ]]; then
    say "$PROGRAM: broke off by a fault of its own (status $1)"
    exit "$EX_UNHEALTHY"
  fi
}

# Begins by turning signals off: a second one must not cut what the first one, or the end, began.
finish() {
  local IFS=$' \t\n'    # a signal may have come while `read` had another
  trap '' HUP INT TERM
  ending=yes
  set +e    # nothing that fails here may keep the rest from being done
  if is_loaded local; then finish_child; fi
  if is_loaded reach; then close_tunnel; fi
  give_back || if_cut="${replaced_id:+instance $replaced_id is kept as it was, its storage billed}"
  say_at_stake
  if [[ -n "$scratch" ]]; then rm -rf "$scratch"; fi
}

# Fails if something may still be billed; then the last lines say what, and what ends it.
give_back() {
  local failed=''
  finish_call
  if [[ -n "$ordering" ]]; then
    read_order
    if [[ -z "$rented_id" ]] && is_clear_no; then note refused || true; fi
  fi
  give_back_rented || failed=yes
  give_back_woken || failed=yes
  if is_loaded endpoint; then give_back_endpoint || failed=yes; fi
  [[ -z "$failed" ]]
}

# Prints the ids of this run's instances, one a line.
own_ids() {
  all_rows | key="$run_key" rented="$rented_id" facts '.[]
    | select(is_own or "\(.id)" == env.rented) | .id'
}

# Prints the ids of new instances that do not tell yet whose they are.
unclear_ids() {
  all_rows | before="$before" facts '.[] | select((.known | not) and (is_before | not)) | .id'
}

# usage: say_unclear_ids [BUT_FOR_ID]
say_unclear_ids() {
  local id
  for id in $(unclear_ids); do
    if [[ "$id" != "${1:-}" && "$id" != null ]]; then
      say "instance $id came up meanwhile and does not tell whose it is; if it is nobody's, this" \
        "ends it: $(by_hand destroy instance "$id" -y)"
    fi
  done
}

# Whether an order without an answer may still bring an instance.
order_may_come() { [[ -n "$open_order" ]] && ((now - order_time < APPEAR_SECONDS)); }

# Destroys what this run rented until Vast lists none of it.
give_back_rented() {
  local deadline=$((now + GIVE_BACK_SECONDS)) rounds=0 sent='' id
  local what='what the last order may bring'
  [[ -n "$rented_id$open_order" ]] || return 0
  if [[ -n "$rented_id" ]]; then what="instance $rented_id"; fi
  say "giving back $what: some seconds, and if Vast is slow, at most" \
    "$(((GIVE_BACK_SECONDS + 2 * CALL_SECONDS) / 60)) minutes"
  while ((rounds < 2 || now < deadline)); do
    rounds=$((rounds + 1))
    # An instance that is not listed yet is not gone: Vast must have taken the order to destroy it.
    if [[ -n "$rented_id" && -z "$sent" ]] && destroy_once "$rented_id"; then sent=yes; fi
    if look; then
      for id in $(own_ids); do destroy_once "$id"; done
      if nothing_is_left "$sent"; then
        if [[ -n "$rented_id" ]]; then note destroyed "$rented_id"; else note nothing; fi
        say "${rented_id:+instance $rented_id is destroyed: }this run has nothing rented any more"
        rented_id='' open_order=''
        return 0
      fi
    fi
    pause "$((rounds < 4 ? 2 : 10))"
  done
  say_unclear_ids
  say_still_billed destroy "$(own_ids)" "$rented_id"
  rented_id='' open_order=''    # enough was tried
  return 1
}

# usage: nothing_is_left SENT    (as the last look found it)
nothing_is_left() {
  local own unclear
  own="$(own_ids)" && unclear="$(unclear_ids)" || return 1
  [[ -z "$own" && (-z "$rented_id" || -n "$1") ]] && ! order_may_come &&
    [[ -z "$open_order" || -z "$unclear" ]]
}

# Fails unless Vast took the order, or has no such instance; that it is gone, only a look tells.
destroy_once() {
  if vast destroy instance "$1" -y || [[ "$refused" == 404 ]]; then return 0; fi
  say "destroying $1: $complaint"
  return 1
}

give_back_woken() {
  local attempt
  [[ -n "$woken_id" ]] || return 0
  say "stopping instance $woken_id again: some seconds, and some minutes at most if Vast is slow"
  for attempt in 1 2 3 4 5 6; do
    vast stop instance "$woken_id" || say "stopping $woken_id: $complaint"
    pause 2
    if look && is_stopped "$woken_id"; then
      note stopped "$woken_id" || true
      say_stopped "$woken_id"
      woken_id=''
      return 0
    fi
    pause "$((attempt * 2))"
  done
  say_still_billed stop "$woken_id"
  woken_id=''
  return 1
}

# Whether Vast means instance $1 to be stopped, or lists it no more.
is_stopped() { is_absent "$1" || [[ "$(fact "$(row_of "$1")" .wanted)" == stopped ]]; }

# usage: by_hand WORDS...    (prints the command of vastai that a person can copy)
by_hand() {
  local program=vastai
  if ! has_tool vastai; then program="$VASTAI"; fi
  printf '%s\n' "$(key_for VAST_API_KEY)$program $*"
}

# usage: rescue WORDS...    (prints the command of this script that ends what is billed)
rescue() { printf '%s\n' "$(key_for VASTAI_API_KEY)$AGAIN $*"; }

# usage: key_for VARIABLE    (prints what gives a copied command the key, which must not show; the
# shell it is copied to may not have it, as it may have been set for one call)
key_for() {
  if [[ -n "${VASTAI_API_KEY:-}" ]]; then
    printf '%s=${VASTAI_API_KEY:?your key of Vast} ' "$1"
  elif [[ -n "${VAST_API_KEY:-}" ]]; then
    printf '%s=${VAST_API_KEY:?your key of Vast} ' "$1"
  fi
}

# usage: say_still_billed VERB IDS...    (says of each what ends it; without any, where to look)
say_still_billed() {
  local verb="$1" id ids said=' ' yes=''
  shift
  ids="$*"    # bash 3.2 makes a letter of an empty word in "${*:2}"
  if [[ "$verb" == destroy ]]; then yes=' -y'; fi
  for id in $ids; do
    if [[ "$said" == *" $id "* ]]; then continue; fi
    say "instance $id may still be billed; this ends it: $(by_hand "$verb" instance "$id$yes")"
    said="$said$id "
  done
  if [[ "$said" != ' ' ]]; then return 0; fi
  say "an order went out and Vast does not tell what became of it: it may be billed. See whether" \
    "$(by_hand show instances) or https://cloud.vast.ai/instances/ lists a '$LABEL', and end it:" \
    "$(by_hand destroy instance ID -y)"
}

at_stake=' '    # VERB:ID of what this run is to stop or destroy and has not, between blanks

# usage: stake VERB IDS    (joined by blanks or line feeds)
stake() {
  local id
  for id in $2; do at_stake="$at_stake$1:$id "; done
}

# usage: unstake VERB ID
unstake() { at_stake="${at_stake/ $1:$2 / }"; }

# Whatever ended this run, the last lines say what it was to end and may still be billed.
say_at_stake() {
  local one
  for one in $at_stake; do say_still_billed "${one%%:*}" "${one#*:}"; done
  at_stake=' '
}

# -----------------------------------------------------------------------------
# Offers

# The options of search.
gpus="$DEFAULT_GPUS" min_vram=8 max_price=0.20 max_traffic=0.05 min_reliability=0.95
disk=50 region='' any_machine=''
interruptible='' bid='' image="${BARK_IMAGE:-$DEFAULT_IMAGE}"
readonly SEARCH_OPTIONS='--gpu=gpus --min-vram=min_vram --max-price=max_price
 --max-traffic=max_traffic --min-reliability=min_reliability --disk=disk --region=region
 --interruptible:interruptible --bid=bid --any-machine:any_machine --image=image'

# usage: check_search COMMAND    (the options of search, one by one and what one asks of another)
check_search() {
  need_number "$1" --min-vram "$min_vram" 1 1000
  need_number "$1" --max-price "$max_price" 0.001 128
  need_number "$1" --max-traffic "$max_traffic" 0 10
  need_number "$1" --min-reliability "$min_reliability" 0 1
  need_whole "$1" --disk "$disk" 8 2000
  disk="$((10#$disk))"
  if is_said --gpu; then read_gpus "$1"; fi
  if is_said --region; then read_region "$1"; fi
  if [[ -n "$bid" ]]; then check_bid "$1"; fi
  check_image "$1"
}

# usage: read_gpus COMMAND
read_gpus() {
  gpus="$(gpu_names "$gpus")"
  if [[ "$gpus" == ANY ]]; then gpus=''; fi
  [[ "$gpus" =~ ^[A-Za-z0-9\ ,-]*$ ]] ||
    usage_error "--gpu is '$gpus'; it must be names such as 'RTX 3060,RTX 4060 Ti', or any" "$1"
}

# usage: read_region COMMAND
read_region() {
  local typed="$region"
  region="$(region_codes "$typed")" || usage_error \
    "--region is '$typed'; it must be country codes such as DE or DE,FR, or EU" "$1"
}

# usage: check_bid COMMAND
check_bid() {
  need_number "$1" --bid "$bid" 0.001 128
  [[ -n "$interruptible" ]] || usage_error '--bid needs --interruptible' "$1"
  if (($(millionths "$bid") > $(millionths "$max_price"))); then
    usage_error "--bid $bid is more than --max-price $max_price" "$1"
  fi
}

# usage: check_image COMMAND    (and gives an image without a tag one, as Vast takes none without)
# A colon may also stand before a registry's port, and in a digest.
check_image() {
  local part='[a-z0-9]+(([.]|_|__|-+)[a-z0-9]+)*' pattern
  pattern="^([A-Za-z0-9.-]+(:[0-9]+)?/)?$part(/$part)*(:[A-Za-z0-9_][A-Za-z0-9_.-]*)?"
  pattern="$pattern(@sha256:[0-9a-f]{64})?\$"
  [[ "$image" =~ $pattern ]] || usage_error "--image is '$image'; it must be a name in small \
letters, with a tag or digest if need be: ghcr.io/owner/name:tag or ghcr.io/owner/name@sha256:..." \
    "$1"
  if [[ "${image##*/}" != *[:@]* ]]; then image="$image:latest"; fi
}

# Prints what no option changes: what the image and the worker need. The image's CUDA 12.6 build of
# torch has no kernels for Blackwell cards (compute capability 10 and up); its CUDA 13 build does.
hard_query() {
  local cuda='cuda_max_good>=12.6 compute_cap<1000'
  if [[ "$image" == *cu130* ]]; then cuda='cuda_max_good>=13.0'; fi
  printf '%s\n' "num_gpus=1 cpu_arch=amd64 $cuda direct_port_count>=2 inet_down>=$MIN_DOWNLOAD\
 disk_space>=$disk"
}

soft_query() {
  local query="gpu_ram>=$min_vram reliability>$min_reliability dph_total<=$max_price"
  query="$query inet_down_cost<=$max_traffic"
  if [[ -n "$gpus" ]]; then query="$query gpu_name in [${gpus// /_}]"; fi
  if [[ -n "$region" ]]; then query="$query geolocation in [$region]"; fi
  printf '%s\n' "$query"
}

offers='[]'    # the cheapest first

# usage: search_offers QUERY LIMIT [FILTER]    (sets offers)
search_offers() {
  local type=on-demand
  if [[ -n "$interruptible" ]]; then type=bid; fi
  persist vast_json array search offers "$1" --type "$type" --storage "$disk" \
    --order dph_total --limit "$2" || die_by_vast 'the offers cannot be searched'
  offers="$(feed "$reply" facts "offers | ${3:-.} | tojson")"
}

# Gives the GPUs that a person typed the names that Vast has; ends if it has none like that.
check_gpus() {
  local names unknown near
  if [[ -z "$gpus" ]] || ! is_said --gpu; then return 0; fi
  names="$(known_gpus)" || return 0
  unpack "$(typed="$gpus" feed "$names" facts 'unmatched(env.typed)')" unknown near
  if [[ -n "$unknown" ]]; then
    die "$EX_USAGE" "unknown GPU '$unknown'; did you mean one of: $near?"
  fi
  gpus="$(typed="$gpus" feed "$names" facts 'matched(env.typed)')"
}

# usage: find_offers [LAST_WORD]
# Sets offers to those that start would take; ends with advice if there is none.
# Vast's own filter is not the last word on what costs money.
find_offers() {
  check_gpus
  search_offers "$(hard_query) $(soft_query)" 64 'map(select(.winning
    and .cost <= (env.max_price | tonumber) and .traffic <= (env.max_traffic | tonumber)))'
  if [[ "$offers" != '[]' ]]; then
    leave_out_failed "$@"
    return 0
  fi
  if can_load search; then say_what_would_fit; fi
  die "$EX_REFUSED" "No suitable GPU found; widen --max-price, --min-vram, --gpu, --region,
--max-traffic or --min-reliability, or ask for less --disk${bid:+ or a higher --bid}\
${1:+; $1}"
}

# usage: leave_out_failed [LAST_WORD]    (takes the machines that failed within a day from offers)
leave_out_failed() {
  local failed all="$offers"
  if [[ -n "$any_machine" ]]; then return 0; fi
  failed="$(journal 'failed_machines | tojson' 2>/dev/null)" || return 0
  offers="$(failed="$failed" feed "$all" facts '(env.failed | fromjson) as $failed
    | map(select(.machine | is_one_of($failed) | not)) | ranked | tojson')"
  if [[ "$offers" == "$all" ]]; then return 0; fi
  say "left out, as their machines failed here within a day (--any-machine takes them): offers" \
    "$(left="$offers" feed "$all" facts '. - (env.left | fromjson) | map(.id | tostring)
      | join(", ")')"
  if [[ "$offers" == '[]' ]]; then
    die "$EX_REFUSED" "no other offer fits; to try these again: --any-machine${1:+; $1}"
  fi
}

# usage: show_offer OFFER
show_offer() {
  fact "$1" '"offer \(.id): \(sentence)
  of it storage: \(.storage | fixed(4)) $/h, stopped too
  the first start downloads some \(env.first_start) GB: \(.first | fixed(2)) $ (traffic: \(.traffic
    | fixed(3)) $/GB)
  \(if .bid then "interruptible, bid \(.bid) $/h" else "on demand" end), "
    + "reliability \(.reliability * 100 | fixed(1)) %, download \(.down | round) Mb/s"'
}

# -----------------------------------------------------------------------------
# Waiting for a worker

# What a wait finds out. `conclude` sets how it ended and why, see_instance the rest.
outcome=''    # ready; of the machine: failed, dead, late; no-image, settings, dear, taken, lost; by
              # somebody else: gone, stopped
reason=''     # what to say of it
row=''        # the instance as last seen; of a command that waits for none, by need_instance
address=''    # of its worker
phase='' phase_shown=''             # what it did when last seen, and what of that was shown
rival=''                            # the instance of another start that came first
wait_began=0 wait_limit=0           # when, in `now`, as the next three; and for how many seconds
running_since='' scheduling_since='' silent_since=0
gpu_price='' storage_price=0        # millionths of $/h; nothing while Vast does not tell
traffic_cost=0                      # of the first start, in millionths of $
old_ends=''                         # how often the worker had ended before
was_listed='' meant_to_run=''       # yes once Vast has listed it so
absent_looks=0                      # in a row, of one that was listed before
lost_looks=0 lost_time=0            # in a row, that say offline or unknown

# usage: conclude [OUTCOME [REASON]]
conclude() { outcome="${1:-}" reason="${2:-}"; }

# usage: await_worker ID SECONDS    (fails unless outcome is ready)
# Vast is asked only while the worker itself does not answer.
await_worker() {
  tick
  begin_wait "$1"
  wait_limit="$2"
  if ! until_true "$2" "$POLL" has_outcome "$1"; then
    conclude late "instance $1 was not healthy within $2 s: $phase"
    if [[ "$phase" == scheduling* ]]; then conclude taken "$reason"; fi
  fi
  [[ "$outcome" == ready ]]
}

# usage: has_outcome ID    (after one more look)
has_outcome() {
  hear_worker || see_instance "$1" || true
  if [[ -z "$outcome" && -n "$address" && "$phase" == running* ]]; then hear_worker || true; fi
  if [[ -n "$outcome" ]]; then return 0; fi
  show_phase
  return 1
}

# usage: begin_wait ID
begin_wait() {
  conclude
  row='' address='' phase='waiting for Vast' rival='' gpu_price=''
  wait_began=$now running_since='' scheduling_since='' silent_since=$now old_ends=''
  was_listed=yes meant_to_run='' absent_looks=0 lost_looks=0 lost_time=-99
  if [[ "$1" == "$rented_id" ]]; then
    old_ends=0 was_listed='' meant_to_run=yes
  elif [[ "$1" != "$woken_id" && "$(fact "$(row_of "$1")" .wanted)" == running ]]; then
    meant_to_run=yes
  fi
}

# Shows what happens, for how long of the time that there is, and what it cost so far if that can be
# told. Forks nothing: it also runs where a signal waits.
show_phase() {
  local so_far="$((now - wait_began)) of $wait_limit s" cost=0 room width=80 text="$phase"
  if [[ -n "$gpu_price" ]]; then
    add_cost
    printf -v so_far '%s, %d.%04d $' "$so_far" "$((cost / 1000000))" "$((cost % 1000000 / 100))"
  fi
  if [[ -t 2 ]]; then
    # A wrapped line cannot go. From bash 5 on COLUMNS follows the terminal.
    if [[ "${COLUMNS:-}" =~ ^[1-9][0-9]{1,3}$ ]]; then width="$COLUMNS"; fi
    room=$((width - 3 - ${#so_far}))
    if ((room < 16)); then room=16; fi    # the end of a long one tells most
    if ((${#text} > room)); then text="${text:0:12}...${text:$((${#text} - room + 15))}"; fi
    printf '\r\033[K%s: %s' "$so_far" "$text" >&2 || true
    line_open=yes
  elif [[ "$phase" != "$phase_shown" ]]; then
    say "$so_far: $phase"
  fi
  phase_shown="$phase"
}

# Shows it again as time goes on, if it stands on a terminal.
refresh_phase() { if [[ -n "$line_open" ]]; then show_phase; fi; }

# Sets cost of its caller, in millionths of $. The traffic of the first start counts in full, as it
# will come.
add_cost() {
  cost=$(((now - wait_began) * storage_price / 3600))
  if [[ -n "$rented_id" ]]; then cost=$((cost + traffic_cost)); fi
  if [[ -n "$running_since" ]]; then cost=$((cost + (now - running_since) * gpu_price / 3600)); fi
}

# Asks the worker; fails if there is no answer. What ends with status 2 refuses its settings.
hear_worker() {
  local health
  [[ -n "$address" ]] || return 1
  health="$(health_of "$address")" || return 1
  tick
  silent_since=$now
  phase="$(feed "$health" facts '.status + if .progress.bytes_total then (.progress
      | " \(100 * .bytes_done / .bytes_total | floor) % of \(.bytes_total / 1e9 | fixed(1)) GB")
    elif .error then ": " + (.error | clean) else "" end')"
  case "$phase" in
    ready*) conclude ready ;;
    failed*)
      conclude "$(feed "$health" facts 'if .exit_status == 2 then "settings" else "failed" end')" \
        "the worker $phase" ;;
  esac
}

# usage: see_instance ID    (asks Vast, and decides if the instance can no longer get healthy)
# Fails if Vast does not answer.
see_instance() {
  local found too_dear state wanted message
  if ! look; then
    phase="$complaint"
    return 1
  fi
  found="$(feed "$instances" facts ".[] | select(.id == $1)"' | tojson, ((.storage // 0) as $storage
    | [if .price then [.price - $storage, 0] | max * 1e6 | round else "" end,
       ($storage * 1e6 | round), .address, (.price // 0) > (env.max_price | tonumber) * 1.001,
       .state, .wanted, .message] | join("|"))')"
  row="${found%%$'\n'*}"
  if [[ -z "$row" ]]; then
    judge_absence "$1"
    return 0
  fi
  was_listed=yes absent_looks=0
  unpack "${found#*$'\n'}" gpu_price storage_price address too_dear state wanted message
  if [[ "$1" == "$rented_id" ]]; then check_rented "$1" "$too_dear"; fi
  if [[ -z "$outcome" || "$outcome" == ready ]]; then judge_state "$1"; fi
}

# usage: judge_absence ID
# A new instance may take a while to be listed; one that was listed is gone after two looks.
judge_absence() {
  if ! is_absent "$1"; then
    phase="Vast's row of it cannot be read"
  elif [[ -n "$was_listed" ]]; then
    absent_looks=$((absent_looks + 1))
    phase='not in the list of Vast any more'
    if ((absent_looks > 1)); then
      conclude gone "instance $1 was destroyed meanwhile, and not by this run"
    fi
  else
    phase='not in the list of Vast yet'
    if ((now - wait_began >= APPEAR_SECONDS)); then
      conclude failed "Vast does not list instance $1"
    fi
  fi
}

# usage: check_rented ID TOO_DEAR    (true or false)
# What concerns only an instance of this run: it is its only one, the first one, within the price.
check_rented() {
  local strays id
  unpack "$(rented="$1" key="$run_key" before="$before" feed "$instances" facts '
    "\(map(select(is_rival))[0].id // "")|\(map(select(is_own and "\(.id)" != env.rented).id)
      | join(" "))"')" rival strays
  for id in $strays; do    # late fruit of unanswered orders
    say "instance $id showed up late: destroying it"
    destroy_once "$id" || true
  done
  if [[ -n "$rival" ]]; then
    conclude lost "another start rented instance $rival at the same time"
  elif [[ "$2" == true ]]; then
    conclude dear \
      "instance $1 costs $(fact "$row" .price) \$/h, more than --max-price $max_price"
  fi
}

# Whether the last look leaves no doubt: nothing else of this run, and no lower id that is bare yet.
is_settled() {
  ! order_may_come && [[ "$(own_ids)" == "$rented_id" ]] &&
    [[ "$(min_id "$(unclear_ids)" "$rented_id")" == "$rented_id" ]]
}

min_id() { printf '%s\n' "$@" | sort -n | grep -m 1 .; }

# Before a healthy instance counts: another start's may have come first, an order without an answer
# may have brought a second one. Fails if this run's has to go, or was ended by somebody.
settle() {
  until_true "$APPEAR_SECONDS" 1 may_settle || true
  [[ "$outcome" == ready ]]
}

may_settle() {
  see_instance "$rented_id" || return 1
  if [[ "$outcome" == ready ]]; then
    [[ -n "$row" ]] && is_settled
  fi
}

# usage: judge_state ID    (by state, wanted and message of its caller)
judge_state() {
  if [[ "$wanted" == running ]]; then meant_to_run=yes; fi
  if [[ "$wanted" == stopped && -n "$meant_to_run" ]]; then
    conclude stopped "instance $1 was stopped meanwhile, and not by this run"
  fi
  if [[ -n "$outcome" ]]; then return 0; fi
  phase="$state${message:+: $message}"
  if [[ ! "$state" =~ ^(offline|unknown)$ ]]; then lost_looks=0; fi
  if [[ "$1" == "$woken_id" && -z "$running_since" &&
    "$state" =~ ^(exited|outbid|stopped|stopping)$ ]]; then
    state=scheduling    # it has not come up again yet
  fi
  case "$state" in
    running) judge_running "$1" ;;
    provisioning | loading | rebooting) ;;
    scheduling) wait_for_gpu "$1" ;;
    offline | unknown) count_lost_look "$1" "$state" ;;
    error)
      if is_image_fault "$(fact "$row" .said)"; then
        conclude no-image "instance $1: $message"
      else
        conclude failed "instance $1: $message"
      fi ;;
    outbid) conclude taken "instance $1 is outbid${message:+: $message}" ;;
    *) conclude failed "instance $1 is $state${message:+: $message}" ;;
  esac
}

# usage: judge_running ID
judge_running() {
  running_since="${running_since:-$now}" scheduling_since=''
  phase='running; the worker does not answer yet'
  if [[ -z "$address" ]]; then
    phase="$phase: Vast tells no port of it"
    if ((now - running_since >= PORT_SECONDS)); then
      conclude failed \
        "instance $1 runs, but Vast tells no port of it, so that nobody can ever reach it"
      return 0
    fi
  fi
  if ((now - silent_since >= LOG_SECONDS)); then
    silent_since=$now
    read_log "$1"
  fi
}

# usage: count_lost_look ID STATE    (its host may only be away for a moment)
count_lost_look() {
  if ((now - lost_time >= LOST_APART)); then
    lost_looks=$((lost_looks + 1)) lost_time=$now
  fi
  if ((lost_looks >= LOST_LOOKS)); then
    conclude dead "instance $1 is $2, in $LOST_LOOKS looks one after the other"
  fi
}

wait_for_gpu() {
  phase="scheduling${phase#"${phase%%:*}"}"
  scheduling_since="${scheduling_since:-$now}"
  if ((now - scheduling_since >= SCHEDULING_SECONDS)); then
    conclude taken "the GPU of instance $1 is taken, by somebody else in most cases"
  fi
}

# Whether every host would fail like this.
is_image_fault() {
  local text pattern='manifest.*(unknown|not found)|(pull access|requested access|registry).*denied'
  pattern="$pattern|unauthorized|repository.*not exist|name unknown|invalid reference"
  pattern="$pattern|no matching manifest|manifests/.*denied"
  text="$(feed "$1" tr '[:upper:]' '[:lower:]')"
  [[ "$text" =~ $pattern ]]
}

# usage: read_log ID    (shows the log's last line; a worker that cannot start says so there)
# The log outlives a stop, so what stands in it at first may be of an earlier run.
read_log() {
  local ends last text fault='' pattern='bark-worker ended with status '
  vast logs "$1" --tail 1000 || return 0
  text="$(without_keys "$reply")"
  ends="$(feed "$text" grep -c "$pattern")" || true
  old_ends="${old_ends:-$ends}"
  last="${text##*$'\n'}"
  phase="running; its log says: ${last:0:150}"
  if [[ "$last" == "${pattern}2" && ("$1" != "$woken_id" || "$ends" != "$old_ends") ]]; then
    fault=settings
  elif ((ends >= old_ends + 3)); then
    fault=failed
  fi
  if [[ -n "$fault" ]]; then
    conclude "$fault" "the worker does not start:"$'\n'"$(feed "$text" tail -n 8)"
  fi
}

# Prints a text of the instance with the workers' keys blotted out, and what is named like a secret.
without_keys() {
  local text="$1" key
  while IFS= read -r key; do
    if [[ -n "$key" ]]; then text="${text//"$key"/[key]}"; fi
  done < <(feed "$instances" facts '.[].key')
  feed "$text" sed -E 's/([A-Z0-9_]*(KEY|TOKEN|SECRET|PASSWORD)[A-Z0-9_]*=)'\
'("[^"]*"|[^" ]+)/\1[key]/g'
}

# -----------------------------------------------------------------------------
# start

model="${BARK_MODEL:-}" voice="${BARK_VOICE:-}" listen="${BARK_LISTEN:-}" timeout="$TIMEOUT"
idle_stop="${BARK_IDLE_STOP:-$IDLE_STOP}"           # minutes; 0 is never, here and below
start_limit="${BARK_START_LIMIT:-$START_LIMIT}"     # minutes
max_hours="${BARK_MAX_HOURS:-0}"
replace='' dry_run=''    # yes or nothing
replaced_id=''           # the old instance that goes when the new one is healthy

parse_start() {
  read_target start "$SEARCH_OPTIONS --model=model --voice=voice --listen=listen --timeout=timeout
 --idle-stop=idle_stop --max-hours=max_hours --replace:replace --dry-run:dry_run -y:agreed
 --yes:agreed" "$@"
  check_search start
  check_worker start
  need_whole start --timeout "$timeout" 1 86400
  timeout="$((10#$timeout))"
  check_guards
}

# Prints the names of what was said that only a new instance can have.
rent_options() {
  local name names=''
  for name in $said_options BARK_IMAGE BARK_MODEL BARK_VOICE BARK_LISTEN BARK_IDLE_STOP \
    BARK_START_LIMIT BARK_MAX_HOURS $PASSED_ON; do
    case "$name" in
      --timeout | --replace | --dry-run | --any-machine | -y | --yes) ;;
      --*) names="$names, $name" ;;
      *) if [[ -n "${!name:-}" ]]; then names="$names, $name"; fi ;;
    esac
  done
  printf '%s\n' "${names#, }"
}

# What is said of guards. No instance stops itself while `start` still waits for it.
check_guards() {
  need_number start "$(said_or --idle-stop BARK_IDLE_STOP)" "$idle_stop" 0 "$MOST_MINUTES"
  need_number start BARK_START_LIMIT "$start_limit" 0 "$MOST_MINUTES"
  need_number start "$(said_or --max-hours BARK_MAX_HOURS)" "$max_hours" 0 "$MOST_HOURS"
  if [[ -z "${BARK_START_LIMIT:-}" ]] && ((timeout >= 60 * START_LIMIT)); then
    start_limit=$((timeout / 60 + 1))
  fi
}

# usage: said_or OPTION VARIABLE    (prints where the setting came from)
said_or() { if is_said "$1"; then printf '%s\n' "$1"; else printf '%s\n' "$2"; fi; }

# usage: check_worker COMMAND    (what a rented worker is given)
check_worker() {
  local name
  if [[ "$model" == builtin-voice ]]; then model=/app/builtin-voice; fi    # where the image has it
  if [[ -n "$model" ]]; then check_model "$1"; fi
  if [[ -n "$voice" ]]; then need_plain "$1" --voice "$voice"; fi
  if [[ -n "$listen" ]]; then check_listen "$1"; fi
  for name in $PASSED_ON; do
    if [[ -n "${!name:-}" ]]; then need_plain "$1" "$name" "${!name}"; fi
  done
}

# usage: check_model COMMAND
check_model() {
  need_plain "$1" --model "$model"
  [[ "$model" =~ ^[^/.][^/]*/[^/]+$ || "$model" == /app/builtin-voice ]] || usage_error \
    "--model is '$model'; it must be a hub id such as suno/bark, or builtin-voice: a folder of this
machine is not on the rented one" "$1"
}

# usage: check_listen COMMAND    (a wrong name would fail on a machine that is paid for)
check_listen() {
  local name
  name="$(said_or --listen BARK_LISTEN)"
  case "$listen" in
    off | tiny | base | small | medium | large-v3 | tiny.en | base.en | small.en | medium.en) ;;
    [!/.~]*/*) ;;    # a hub id
    *) usage_error "$name is '$listen'; it must be off, tiny, base, small, medium, each but off \
also with .en for English alone, large-v3, or a hub id such as Systran/faster-whisper-base: a \
folder of this machine is not on the rented one" "$1" ;;
  esac
  need_plain "$1" "$name" "$listen"
}

cmd_start() {
  local targets chosen state id
  parse_start "$@"
  if_cut='nothing is rented'
  if [[ -z "$dry_run" ]]; then foretell_yes 'nothing new is rented'; fi
  offer_vastai
  find_targets
  chosen="$(chosen_row "$targets")"
  if [[ -z "$chosen" ]]; then
    rent
    return 0
  fi
  unpack "$(fact "$chosen" '"\(.id)|\(.state)"')" id state
  if [[ -n "$dry_run" ]]; then
    say "instance $id is $state: start would use it"
    tell "$(describe "$(with_health "$chosen")")"
    return 0
  fi
  case "$state" in
    stopped | stopping) wake "$id" ;;
    running | provisioning | loading | rebooting | scheduling | offline | unknown)
      join "$id" "$state" ;;
    outbid) replace_or_die "$id" "$EX_REFUSED" "instance $id is outbid; it comes back by itself when
nobody bids more, or at once for a higher bid: $(by_hand change bid "$id")" ;;
    *) replace_or_die "$id" "$EX_REFUSED" "instance $id is $state$(fact "$chosen" \
      'if .message == "" then "" else ": " + .message end')" ;;
  esac
}

say_what_does_not_count() {
  local names
  names="$(rent_options)"
  if [[ -n "$names" ]]; then
    say "it keeps what it was rented with; for a new one with $names, destroy it first:" \
      "$AGAIN destroy${target_id:+ $target_id}"
  fi
}

# usage: join ID [STATE]    (waits for an instance that is not this run's, and leaves it alone)
join() {
  say "instance $1 is there already"
  if_cut="instance $1 is left as it is, and billed"
  say_what_does_not_count
  if await_worker "$1" "$timeout"; then
    note ready "$1" || true
    announce "$1"
    return 0
  fi
  if [[ "$outcome" == dead && "${2:-}" =~ ^(offline|unknown)$ ]]; then
    replace_or_die "$1" "$EX_REFUSED" "$reason"
    return 0
  fi
  respect_others "$1"
  say "instance $1 is left as it is, and billed; to end it: $(rescue destroy "$1")"
  case "$outcome" in
    late) die "$EX_LATE" "$reason" ;;
    failed | settings | dead) die "$EX_UNHEALTHY" "$reason" ;;
    *) die "$EX_REFUSED" "$reason" ;;
  esac
}

# usage: respect_others ID    (ends if somebody else ended the instance, and leaves all as it is)
respect_others() {
  local kept=''
  if [[ -n "$replaced_id" || "$outcome" == gone ]]; then kept="; $(what_is_left)"; fi
  if [[ "$outcome" =~ ^(gone|stopped)$ ]]; then
    rented_id='' woken_id='' if_cut=''
    note "$outcome" "$1" || true
  fi
  case "$outcome" in
    gone) die "$EX_NO_INSTANCE" "$reason$kept" ;;
    stopped) die "$EX_REFUSED" "$reason: it is left as it is, and $(storage_cost "$row")$kept
To wake it: $AGAIN start${target_id:+ $target_id}; to end that, too: $(rescue destroy "$1")" ;;
  esac
}

# usage: wake ID    (starts a stopped instance)
wake() {
  local status
  say "instance $1 is stopped: starting it again"
  say_what_does_not_count
  note_order wake "$(row_of "$1")" '{machine, price}' "$1"
  woken_id="$1" if_cut=''
  conclude
  ask_to_start "$1"
  if [[ -z "$outcome" ]] && await_worker "$1" "$timeout"; then
    woken_id=''
    note ready "$1" || true
    announce "$1"
    return 0
  fi
  respect_others "$1"
  case "$outcome" in
    late) status="$EX_LATE" ;;
    failed | settings) status="$EX_UNHEALTHY" ;;
    *) status="$EX_REFUSED" ;;
  esac
  give_back || leave "$EX_REFUSED"
  replace_or_die "$1" "$status" "$reason"
}

# usage: ask_to_start ID    (sets outcome if Vast says no; no answer leaves that to be seen)
ask_to_start() {
  if ! persist vast start instance "$1" && is_clear_no && [[ "$refused" != 429 ]]; then
    die_by_vast "instance $1 cannot be started"
  fi
  if [[ -z "$complaint" && -n "$reply" && "$reply" != starting* ]]; then
    conclude taken "instance $1 does not start; Vast says: $reply"
  fi
}

# usage: replace_or_die ID STATUS MESSAGE
replace_or_die() {
  if [[ -z "$replace" ]]; then
    die "$2" "$3
To rent another and destroy this one then: $AGAIN start --replace${target_id:+ $target_id}
While Vast lists it, its storage is billed; to end that: $(rescue destroy "$1")"
  fi
  say "$3: renting another"
  replaced_id="$1" if_cut="$(what_is_left)"
  rent
  stake destroy "$1"
  replaced_id=''
  look_or_die
  if [[ "$(fact "$(row_of "$1")" 'state_is_live')" == true ]]; then
    unstake destroy "$1"
    say "instance $1, which was to be replaced, runs again: it is left alone, and billed"
    return 0
  fi
  say "destroying instance $1, which it replaces"
  destroy_confirmed "$1" || leave "$EX_REFUSED"
}

# Rents the cheapest offer whose worker gets healthy.
rent() {
  local orders=0 rented=0 offer
  if say_odd_rows; then
    die "$EX_REFUSED" "nothing is rented beside an instance that may be ours and cannot be read"
  fi
  if can_load account; then ask_credit; fi
  find_offers "$(what_is_left)"
  offer="$(first_offer)"
  if [[ -n "$dry_run" ]]; then tell "$(show_offer "$offer")"; else say "$(show_offer "$offer")"; fi
  if is_loaded account; then say_credit "$(fact "$offer" .cost)"; fi
  if [[ -n "$dry_run" ]]; then
    say 'dry run: nothing is rented'
    return 0
  fi
  agree "Rent it (if it fails, the next, up to $max_price \$/h)?" renting rented    # asked once
  run_key="$(od -An -N 24 -tx1 /dev/urandom | tr -d ' \n')"
  before="$(feed "$instances" facts 'map(.id | tostring) | join(" ")')"
  while ((rented < ATTEMPTS && orders < ORDERS)); do
    if ((orders > 0)); then
      offer="$(first_offer)"
      if [[ -z "$offer" ]]; then break; fi
      say "$(show_offer "$offer")"
    fi
    orders=$((orders + 1))
    if order_instance "$offer"; then
      rented=$((rented + 1))
      if try_rented; then return 0; fi
      drop_offer ' and (.machine == null or .machine != $first.machine)'
    elif [[ "$refused" == 429 ]]; then
      pause 15
    else
      drop_offer
    fi
  done
  rent_failed "$rented"
}

# Prints the offer that is next; nothing after the last.
first_offer() { feed "$offers" facts '.[0] | select(.) | tojson'; }

# usage: drop_offer [CONDITION]    (which others have to meet to stay)
drop_offer() {
  offers="$(feed "$offers" facts \
    ".[0] as \$first | map(select(.id != \$first.id${1:-})) | tojson")"
}

# usage: rent_failed RENTED
rent_failed() {
  local last="${reason%%$'\n'*}"    # the rest was said
  last="$last; $(what_is_left)"
  if (($1 == 0)); then die "$EX_REFUSED" "no offer could be had; the last: $last"; fi
  if [[ "$outcome" == late ]]; then die "$EX_LATE" "$last"; fi
  die "$EX_REFUSED" "$1 tried, none got healthy; the last: $last"
}

what_is_left() {
  if [[ -z "$replaced_id" ]]; then
    printf 'nothing is rented\n'
  else
    printf 'nothing new is rented, and instance %s is kept as it was, its storage billed\n' \
      "$replaced_id"
  fi
}

# Prints what `create` passes to the container, in the form its --env wants.
container_env() {
  local name
  printf '%s' "-p $WORKER_PORT:$WORKER_PORT -e BARK_API_KEY=$run_key -e HF_HOME=$MODELS"
  if [[ -n "$model" ]]; then printf ' -e BARK_MODEL=%s' "$model"; fi
  if [[ -n "$voice" ]]; then printf ' -e BARK_VOICE=%s' "$voice"; fi
  if [[ -n "$listen" ]]; then printf ' -e BARK_LISTEN=%s' "$listen"; fi
  for name in $PASSED_ON; do
    if [[ -n "${!name:-}" ]]; then printf ' -e %s=%s' "$name" "${!name}"; fi
  done
  guard_env BARK_IDLE_STOP "$idle_stop"
  guard_env BARK_START_LIMIT "$start_limit"
  guard_env BARK_MAX_HOURS "$max_hours"
  printf '\n'
}

# usage: guard_env NAME NUMBER    (prints nothing for one that is off)
guard_env() {
  if [[ "$(millionths "$2")" != 0 ]]; then printf ' -e %s=%s' "$1" "$2"; fi
}

# usage: order_instance OFFER    (sets rented_id; fails if there is none, with refused and reason)
# As root, whatever user the image names: Vast sets up SSH inside before it runs what is to start.
order_instance() {
  local offer_id offer_bid fault='Vast tells no instance'
  unpack "$(fact "$1" \
    '"\(.id)|\(.bid // "")|\(.first * 1e6 | round)"')" offer_id offer_bid traffic_cost
  space_calls 'create instance'    # here, so that a signal meanwhile finds no order
  note_order order "$1" '{offer: .id, machine, price: .cost}'
  if_cut=''
  if [[ -n "$replaced_id" ]]; then if_cut="$(what_is_left)"; fi
  rented_id='' ordering=yes open_order=yes    # one command: no signal splits it
  vast_json object create instance "$offer_id" --image "$image" --disk "$disk" --label "$LABEL" \
    --ssh --direct --user root --cancel-unavail ${offer_bid:+--bid_price "$offer_bid"} \
    --env "$(container_env)" --onstart-cmd "$ON_START" || fault="$complaint"
  read_order
  if [[ -n "$rented_id" ]]; then
    note rented "$rented_id" || true
    return 0
  fi
  if is_clear_no; then note refused || true; else note unanswered || true; fi
  case "$refused" in
    404 | 410) fault="offer $offer_id is gone" ;;
    429) fault='Vast wants fewer orders' ;;
    no) fault="Vast does not rent offer $offer_id: $complaint" ;;
    *)
      if is_clear_no; then die_by_vast "offer $offer_id cannot be rented"; fi
      find_order "$fault"
      if [[ -n "$rented_id" ]]; then
        note rented "$rented_id" || true
        return 0
      fi
      note nothing || true
      fault="no answer to the order of offer $offer_id, and nothing came of it" ;;
  esac
  conclude "$outcome" "$fault"
  say "$fault"
  return 1
}

# Whether what was asked for last has no effect for certain: 408 may come from a proxy between.
is_clear_no() { [[ "$refused" =~ ^(no|usage|4[0-9]{2})$ && "$refused" != 408 ]]; }

# usage: reply_says FILTER    (prints nothing if the reply is no JSON object)
reply_says() { feed "$reply" jq -r "objects | $1" 2>/dev/null || true; }

# Closes the last order if its answer is clear: an instance, a refusal or "no". That may have come
# while a signal was being handled, or one may break in here: so the last line is one command.
# The answer holds a secret of the instance's.
read_order() {
  local success contract said left="$open_order"
  order_time=$now
  read_reply
  unpack "$(reply_says '(.msg // .error // "no reason given" | tostring | gsub("[\\s|]+"; " "))
    as $said | "\(.success | tojson)|\(.new_contract)|\($said)"')" success contract said
  if [[ "$success" != true || ! "$contract" =~ ^[0-9]+$ ]]; then contract=''; fi
  if [[ "$success" == false ]]; then complain "$said" no; fi
  if [[ -n "$contract" ]] || is_clear_no; then left=''; fi
  rented_id="$contract" open_order="$left" ordering=''
}

# usage: find_order COMPLAINT
# After an order without a clear answer: sets rented_id to what came of it; or to nothing, once that
# is certain. Until then nothing else is ordered: where no look settles it, this run ends.
find_order() {
  say "no clear answer to the order ($1): looking for what it brought, for up to" \
    "$UNANSWERED_SECONDS s, and ordering nothing else"
  pause 2
  until_true "$UNANSWERED_SECONDS" 2 order_is_clear ||
    die "$EX_REFUSED" "Vast does not tell what came of the order; nothing else is rented"
}

# Looks, and closes the order if that settles it.
order_is_clear() {
  local found unclear
  look && found="$(own_ids)" && unclear="$(unclear_ids)" || return 1
  if [[ -n "$found" ]]; then
    rented_id="${found%%$'\n'*}" open_order=''
    return 0
  fi
  if [[ -n "$unclear" ]] || order_may_come; then return 1; fi
  open_order=''
}

# Brings the instance just rented to health, or gives it back; fails if the next may be tried.
try_rented() {
  say "instance $rented_id is rented"
  if await_worker "$rented_id" "$timeout" && settle; then
    announce "$rented_id"
    keep_rented
    return 0
  fi
  respect_others "$rented_id"
  say "$reason"
  if [[ -n "$running_since" && "$reason" != *$'\n'* && "$outcome" != lost ]]; then
    show_last_words "$rented_id"
  fi
  if is_fault_of_machine; then note failed "$rented_id" || true; fi
  give_back || leave "$EX_REFUSED"
  case "$outcome" in
    no-image) die "$EX_REFUSED" "the image $image cannot be pulled; $(what_is_left)" ;;
    settings) die "$EX_REFUSED" "the worker refuses its settings, as it would on every machine;\
 $(what_is_left)" ;;
    lost) join "$rival" ;;
    *) return 1 ;;
  esac
}

# Whether it is the machine's, for all that is known: a model of one's own may be wrong on every
# machine, and a time below the usual one too short for a good one.
is_fault_of_machine() {
  case "$outcome" in
    dead) return 0 ;;
    late) ((timeout >= TIMEOUT)) ;;
    failed) [[ -z "$model$listen" || "$reason" != 'the worker '* ]] ;;
    *) return 1 ;;
  esac
}

# From here on the healthy instance stays; strays that could not be destroyed are named.
keep_rented() {
  local kept="$rented_id" strays
  rented_id=''
  strays="$(own_ids | grep -vx "$kept")" || true
  open_order=''
  note ready "$kept" || true
  say_unclear_ids "$kept"
  if [[ -n "$strays" ]]; then
    say_still_billed destroy "$strays"
    leave "$EX_REFUSED"
  fi
}

# usage: show_last_words ID
show_last_words() {
  if vast logs "$1" --tail 8 && [[ -n "$reply" ]]; then
    say "its log ends so:"$'\n'"$(without_keys "$reply" | tail -n 8)"
  fi
}

# usage: announce ID    (prints the address)
announce() {
  local facts_line on="${target_id:+ $target_id}"
  facts_line="$(fact "$row" '"\(.gpu)\(.price | known(", "))"' 2>/dev/null)" || true
  say "ready after $((now - wait_began)) s: instance $1${facts_line:+, $facts_line}"
  tell "$address"
  if [[ -n "$reader_left" ]]; then say "nobody reads the answer, which is $address"; fi
  say "its key: $AGAIN env$on; try it: $AGAIN test${on:+ --id$on}; end the rent: $AGAIN stop$on," \
    "or destroy"
  say_guards
}

# Tells what stops the instance, if something does.
say_guards() {
  local guards on="${target_id:+ $target_id}"
  guards="$(fact "$row" 'guards | ltrimstr("\n  ")' 2>/dev/null)" || true
  if [[ -z "$guards" ]]; then return 0; fi
  say "it $guards: from then on an application gets no connection until $AGAIN start$on wakes it.
Vast documents that it may stop itself; we have not tried it live yet, so look: $AGAIN status"
}

# -----------------------------------------------------------------------------
# status

# usage: with_health ROW    (prints it for others to see: without keys, with the worker's health)
with_health() {
  local health='' url slept
  url="$(fact "$1" .address)"
  if [[ -n "$url" ]]; then health="$(health_of "$url")" || true; fi
  slept="$(row="$1" journal '(env.row | fromjson) as $row | slept($row.id; $row | sleeps)' \
    2>/dev/null)" || true
  printf '%s\n%s\n' "$1" "${health:-null}" | slept="${slept:-0}" facts 'visible | tojson' -s
}

# Prints what a person wants to know of a row with health.
describe() {
  fact "$1" '"instance \(.id): \(.state)\(if .message != "" and .state != "running" then
      " (\(.message))" else "" end), \(.gpu), \(.region)"
    + (if .address == "" then "" else "\n  " + .address end) + "\n  " + costs
    + (if .health then "\n  worker " + worker elif .address != "" then "\n  worker: no answer"
       else "" end) + (if .state == "stopped" then "" else guards + guards_fault end)'
}

cmd_status() {
  local json='' all='' targets id one found='' ready='' credit=''
  read_target status '--json:json --all:all' "$@"
  if [[ -n "$all" ]]; then
    if [[ -n "$target_id" ]]; then usage_error '--all goes without an ID' status; fi
    load account
    status_all "$json"
    return 0
  fi
  open_account
  if can_load account; then ask_credit; fi
  find_targets
  say_open_orders
  if [[ -z "$targets$json" ]]; then
    if is_loaded account; then say_credit 0; fi
    if can_load endpoint; then no_instance_but_perhaps_an_endpoint; else no_instance; fi
  fi
  for id in $(feed "$targets" facts 'select(.state != "unreadable").id'); do
    one="$(with_health "$(row_of "$id")")"
    if [[ "$(fact "$one" .health.ready)" == true ]]; then ready=yes; fi
    if [[ -n "$json" ]]; then found="$found$one"$'\n'; else tell "$(describe "$one")"; fi
  done
  if is_loaded account; then hear_credit; fi
  if [[ -n "$json" ]]; then
    tell "$(printf '%s' "$found" | credit="$credit" odd="$odd_rows" facts '
      {label: env.our_label, instances: .} | with_credit
        + (env.odd | fromjson | if . == [] then {} else {unreadable: map(.id)} end)' -s)"
  elif [[ -n "$credit" ]]; then
    tell "$(credit_words "$(feed "$instances" facts 'map(costs_now) | add // 0')")"
  fi
  say_odd_rows || true
  if [[ "$instances$odd_rows" == '[][]' ]]; then leave "$EX_NO_INSTANCE"; fi
  if [[ -z "$ready" ]]; then leave "$EX_UNHEALTHY"; fi
}

# -----------------------------------------------------------------------------
# logs

cmd_logs() {
  local follow='' tail=1000 daemon=''
  read_target logs '-f:follow --follow:follow -n=tail --tail=tail --daemon:daemon' "$@"
  need_whole logs --tail "$tail" 1 100000
  need_instance
  show_log "$(fact "$row" .id)" "$((10#$tail))" "$daemon" "$follow"
}

# usage: show_log ID TAIL DAEMON FOLLOW
show_log() {
  local failures=0 asked="$2" most="$2" before_lines='' text fresh
  if [[ -n "$4" ]] && (($2 < 1000)); then asked=1000; fi    # between two looks many may come
  while :; do
    if vast logs "$1" --tail "$asked" ${3:+--daemon-logs}; then
      failures=0
      text="$(without_keys "$reply")"
      fresh="$(new_lines <(printf '%s' "$before_lines") <(printf '%s\n' "$text") |
        tail -n "$most")"
      if [[ -n "$fresh" ]]; then tell "$fresh"; fi
      before_lines="$text"$'\n' most="$asked"
    else
      failures=$((failures + 1))
      if ((failures == 3)) || [[ "$refused" =~ ^40[0-9]$ ]]; then
        die_by_vast 'the log cannot be had'
      fi
    fi
    if [[ -n "$reader_left" || (-z "$4" && "$failures" == 0) ]]; then return 0; fi
    pause "$POLL"
  done
}

# usage: new_lines SEEN LOG    (prints the lines of LOG that follow those it shares with SEEN's end)
# A last line that was seen only in part is printed again, whole.
new_lines() {
  awk 'FILENAME == ARGV[1] { seen[++n] = $0; next } { log_[++m] = $0 }
    END {
      for (cut = 0; cut < 2; cut++)
        for (k = n - cut; k > 0; k--) {
          if (k > m) continue
          same = 1
          for (i = 1; i <= k && same; i++) same = seen[n - cut - k + i] == log_[i]
          if (same) { for (i = k + 1; i <= m; i++) print log_[i]; exit }
        }
      for (i = 1; i <= m; i++) print log_[i]
    }' "$1" "$2"
}

# -----------------------------------------------------------------------------
# env

cmd_env() {
  read_target env '' "$@"
  find_running
  tell "$(endpoint_number="${VASTAI_ENDPOINT_ID:-}" fact "$row" '
def quoted: if test("^[A-Za-z0-9._~:/+=-]*$") then . else @sh end;
"
# instance \(.id) on Vast; its address changes when it is stopped and started
BARK_URL=\(.address | quoted)
BARK_API_KEY=\(.key | quoted)
# from this environment: the number of an endpoint, as printed by: endpoint up
VASTAI_ENDPOINT_ID=\(env.endpoint_number | quoted)
# VASTAI_API_KEY=... belongs here if the application rents GPUs itself; it is not the key above"
    | .[1:]')"
}

# -----------------------------------------------------------------------------
# stop, destroy

cmd_stop() {
  local targets ids id failed=''
  read_target stop --now:agreed "$@"
  find_targets
  [[ -n "$targets" ]] || no_instance
  if [[ "$(fact "$targets" .state)" == unreadable ]]; then
    say_odd_rows
    leave "$EX_REFUSED"
  fi
  ids="$(feed "$targets" facts .id)"
  stake stop "$ids"
  for id in $ids; do
    stop_one "$(row_of "$id")" || failed=$?
  done
  if say_odd_rows; then failed="${failed:-$EX_REFUSED}"; fi
  if [[ -n "$failed" ]]; then leave "$failed"; fi
}

# usage: stop_one ROW
stop_one() {
  local id state url
  unpack "$(fact "$1" '"\(.id)|\(.state)|\(.address)"')" id state url
  if [[ "$state" == stopped ]]; then
    unstake stop "$id"
    say "instance $id is stopped already; $(storage_cost "$1")"
    return 0
  fi
  if [[ -n "$url" && -n "$agreed" ]]; then
    say_what_is_cut "$url"
  elif [[ -n "$url" ]]; then
    drain "$url" "$DRAIN_SECONDS"
  fi
  if ! vast stop instance "$id" && [[ "$refused" =~ ^40[13]$ ]]; then
    die_by_vast "instance $id is not stopped"
  fi
  confirm_stopped "$id" || return "$?"
  unstake stop "$id"
  note stopped "$id" || true
  say_stopped "$id"
}

# usage: say_stopped ID    (of the last look)
say_stopped() {
  local listed
  listed="$(row_of "$1")"
  if [[ -z "$listed" ]]; then
    say "Vast lists no instance $1 any more: it costs nothing"
  else
    say "instance $1 is stopped; $(storage_cost "$listed"); start wakes it, destroy ends that too"
  fi
}

storage_cost() {
  fact "$1" '"its storage goes on costing" + (.storage | known(" ")
    + if . then " (\(. * 24 | fixed(2)) $ a day)" else "" end)'
}

# Prints how many requests the worker has, running and waiting; fails if it does not tell.
work_of() {
  local health
  health="$(health_of "$1")" || return 1
  fact "$health" '"\(.queue.running // 0) running, \(.queue.waiting // 0) waiting"'
}

say_what_is_cut() {
  local work
  work="$(work_of "$1")" || return 0
  if [[ "$work" != '0 running, 0 waiting' ]]; then say "this cuts requests: $work"; fi
}

# usage: drain ADDRESS SECONDS    (returns when the worker has nothing to do, or time is up)
drain() {
  local work='' said=''
  until_true "$2" 1 has_no_work "$1" ||
    say "after $2 s still $work: stopping all the same, which cuts them"
}

# usage: has_no_work ADDRESS    (sets work, and says it if it is not what was said)
has_no_work() {
  work="$(work_of "$1")" || return 0
  if [[ "$work" == '0 running, 0 waiting' ]]; then return 0; fi
  if [[ "$work" != "$said" ]]; then say "waiting for requests: $work"; fi
  said="$work"
  return 1
}

# Waits until Vast itself tells that instance $1 is stopped; asks for it again if it is not.
confirm_stopped() {
  local state=''
  if until_true "$STOP_SECONDS" "$((POLL < 5 ? POLL : 5))" has_stopped "$1"; then return 0; fi
  state="$(fact "$(row_of "$1")" .state 2>/dev/null)" || true
  say "Vast was told to stop instance $1, and still lists it as ${state:-unknown}"
  return "$EX_LATE"
}

# usage: has_stopped ID
has_stopped() {
  local state wanted listed
  look || return 1
  listed="$(row_of "$1")"
  if [[ -z "$listed" ]]; then
    is_absent "$1"
    return "$?"
  fi
  unpack "$(fact "$listed" '"\(.wanted)|\(.state)"')" wanted state
  if [[ "$wanted" != stopped ]]; then
    vast stop instance "$1" || say "$complaint"
    return 1
  fi
  [[ "$state" != stopping ]]
}

cmd_destroy() {
  local targets ids id failed=''
  read_target destroy '-y:agreed --yes:agreed' "$@"
  need_yes destroying
  find_targets
  [[ -n "$targets" ]] || no_instance
  say "$(feed "$targets" facts '"instance \(.id): \(.state), \(.gpu)"
    + (if .why then ", " + .why else costs_now | known(", ") end)')"
  agree 'Destroy it, with its disk?' destroying destroyed
  ids="$(feed "$targets" facts .id)"
  stake destroy "$ids"
  for id in $ids; do
    destroy_confirmed "$id" || failed="$EX_REFUSED"
  done
  if [[ -z "$target_id" ]] && say_odd_rows; then failed="$EX_REFUSED"; fi
  if [[ -n "$failed" ]]; then leave "$failed"; fi
}

# Destroys instance $1 and looks until Vast lists it no more; fails if it goes on listing it.
destroy_confirmed() {
  local attempt
  for attempt in 1 2 3 4 5; do
    destroy_once "$1" || true
    if look && is_absent "$1"; then
      unstake destroy "$1"
      note destroyed "$1" || true
      say "instance $1 is destroyed; it costs nothing any more"
      return 0
    fi
    pause "$attempt"
  done
  return 1
}

# -----------------------------------------------------------------------------
# help, main

cmd_help() {
  local usage="$USAGE"
  (($# <= 1)) || usage_error 'help takes one command' help
  if [[ -n "${1:-}" ]]; then
    load "$1"
    usage="$(usage_of "$1")" || unknown_command "$1"
  fi
  tell "$usage"
}

# usage: unknown_command WORD
unknown_command() {
  local hint=''
  if can_load hints; then hint="$(near_command "$1")"; fi
  die "$EX_USAGE" "unknown command '$1'$hint"$'\n'"all commands: $CALLED help"
}

main() {
  local command="${1:-}" word plain=''
  local words=()
  trap '' PIPE    # a reader that leaves ends nothing that costs money
  if [[ "${BARK_TRACE:-0}" != 0 ]]; then load trace; fi
  case "$command" in
    -h | --help) tell "$USAGE"; return 0 ;;
    -v) load trace; main "${@:2}"; return 0 ;;
    --version) tell "$PROGRAM $VERSION"; return 0 ;;
    '')
      say "$USAGE"
      die "$EX_USAGE" 'a command is needed' ;;
  esac
  load "$command"
  usage_of "$command" >/dev/null || unknown_command "$command"
  for word in "${@:2}"; do
    case "$plain$word" in
      -h | --help) cmd_help "$command"; return 0 ;;
      -v) load trace; continue ;;
    esac
    if [[ "$command" == ssh || "$word" == -- ]]; then plain=yes; fi    # ssh's are for the instance
    words+=("$word")
  done
  "cmd_$command" ${words[@]+"${words[@]}"}
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
  main "$@"
  leave 0    # without reading on: a new version may have replaced this file meanwhile
fi
