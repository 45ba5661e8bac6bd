#!/usr/bin/env bash
# A text of any length into one sound file. Sourced by manage-bark-worker.sh when `speak` is called.
# The work is done by speak.py, which finds the rented worker by running the script itself.
#
# Sections: constants and help; speak
# Call vastai: none
# Call curl: none
# Change what is billed: none (with --start, speak.py runs `start`)
#
# shellcheck source=manage-bark-worker.sh
if [[ -z "${PROGRAM:-}" ]]; then source "${BASH_SOURCE[0]%/*}/../manage-bark-worker.sh"; fi

# -----------------------------------------------------------------------------
# Constants and help

readonly "USAGE_speak=usage: $PROGRAM speak FILE -o OUT [OPTIONS]

Reads FILE (.txt, .md, .epub; - is standard input) through the rented worker into OUT (.wav, .mp3,
.opus, .flac, or .m4b with chapters) and prints how long it is. Each paragraph that is spoken is
kept in OUT.parts until OUT is whole: whatever breaks it off, the same command goes on from there.

  --out OUT, -o OUT    what to make
  --url ADDRESS        a worker of this machine or any other; its key is in BARK_API_KEY
  --endpoint           along Vast's route, to the endpoint that VASTAI_ENDPOINT_ID or BARK_LABEL
                       names
  --start              wake the rented instance where it is stopped, which costs money
  --wait MINUTES       for a worker that is not there, before giving up (60)
  --at-once N          requests at a time (what keeps the worker's slots full)
  --voice NAME         (the worker's own)
  --seed N             for another take of all of it
  --plain              without cues or capitals of the worker's own
  --no-notes           leave out foot- and endnotes
  --keep               keep OUT.parts when OUT is whole, for --again
  --again TIME         speak anew the one sentence that is heard at 12:34 in OUT; give the same
                       command with it
  --json               one object
  -q, --quiet          no progress

Exit status 1, and the place, if something could not be spoken: a short silence stands for it. What
Python needs for this, no torch, is installed into .venv."

readonly SPEAK_OPTIONS='WORD -:from_stdin -o=out --out=out --url=url --endpoint:along_route
 --start:said --wait=said --at-once=said --voice=said --seed=said --plain:said --no-notes:said
 --keep:said --again=said --json:said -q:said --quiet:said'

# -----------------------------------------------------------------------------
# Speak

# Sets the way to the endpoint's workers, for speak.py.
find_route() {
  local endpoint_key
  load endpoint
  open_account
  need_endpoint
  need_recruits
  find_endpoint_key
  export SPEAK_ROUTER="$RUN_URL" SPEAK_ENDPOINT_KEY="$endpoint_key"
  SPEAK_ENDPOINT="$(endpoint_fact .endpoint_name)"
  export SPEAK_ENDPOINT
}

# usage: run_speaking WORDS...    (in the place of this script)
run_speaking() {
  export SPEAK_PROGRAM="$ROOT/$PROGRAM" SPEAK_AGAIN="$AGAIN"
  trap - PIPE
  exec "$VENV_PYTHON" "$ROOT/manage/speak.py" "$@"
}

cmd_speak() {
  local said from_stdin='' out='' url='' along_route=''
  read_options speak "$SPEAK_OPTIONS" "$@"
  if [[ -n "$from_stdin" ]]; then operands+=(-); fi
  ((${#operands[@]} == 1)) || usage_error 'speak takes one FILE; - is standard input' speak
  [[ -n "$out" ]] || usage_error 'speak needs a file to make: -o OUT' speak
  load local
  install_part speaking 'what reads books and binds speech'    # never torch
  if [[ -n "$along_route" && -z "$url" ]]; then find_route; fi
  run_speaking "$@"
}

loaded="$loaded speak"
