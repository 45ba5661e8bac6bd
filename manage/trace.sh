#!/usr/bin/env bash
# Tells of each call how long it took and what kind of answer came. Sourced by
# manage-bark-worker.sh under -v and BARK_TRACE=1.
#
# Sections: trace
# Call vastai: none
# Call curl: none
# Change what is billed: none
#
# shellcheck source=manage-bark-worker.sh
if [[ -z "${PROGRAM:-}" ]]; then source "${BASH_SOURCE[0]%/*}/../manage-bark-worker.sh"; fi

# -----------------------------------------------------------------------------
# Trace

exec 5>&2    # calls have no stderr of their own

# usage: trace_call WHAT COMMAND...    (runs it, which may set `kind`, and returns its status)
trace_call() {
  local TIMEFORMAT kind='' status=0 start=''
  if [[ -t 5 ]]; then start=$'\r\033[K'; fi    # in place of a line that shows how far all is
  {
    time {
      "${@:2}" 2>&6 || status=$?
      if ((status > 0)); then kind="no answer (status $status)"; fi
      TIMEFORMAT="$start${1//%/%%}: %R s, ${kind:-an answer}"
    }
  } 6>&2 2>&5
  return "$status"
}

# usage: kind_of STATUS ERRORS ANSWER    (prints in words what a call of the CLI brought)
kind_of() {
  local pattern='"status_code": *([0-9]+)'
  if [[ "$2" =~ $pattern ]]; then
    printf 'HTTP %s\n' "${BASH_REMATCH[1]}"
  elif [[ "$1" != 0 ]]; then
    printf 'exit status %s\n' "$1"
  elif [[ -z "$3" ]]; then
    printf 'nothing\n'
  else
    feed "$3" jq -r '(arrays, (objects | .instances | arrays) | "rows: \(length)") // type' \
      2>/dev/null || printf 'text, not JSON\n'
  fi
}

loaded="$loaded trace"
