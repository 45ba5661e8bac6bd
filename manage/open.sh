#!/usr/bin/env bash
# The rented worker's page in a browser. Sourced by manage-bark-worker.sh when `open` is called.
#
# Sections: constants and help; the page; open
# Call vastai: none
# Call curl: none
# Change what is billed: none
#
# shellcheck disable=SC2016    # programs of jq stand in single quotes
# shellcheck source=manage-bark-worker.sh
if [[ -z "${PROGRAM:-}" ]]; then source "${BASH_SOURCE[0]%/*}/../manage-bark-worker.sh"; fi

# -----------------------------------------------------------------------------
# Constants and help

readonly USAGE_OPEN="usage: $PROGRAM open [--port PORT | --direct]

Opens the worker's page in a browser of this machine, through SSH as tunnel does, until Ctrl-C. The
browser gets the key from a file that only this user can read and that goes at the end. It shows in
no list of processes, no shell's history and no log; the browser's own history may keep it.

  --port PORT    on this machine ($WORKER_PORT)
  --direct       over the open net instead, in plain HTTP: whoever is on the way can read the texts
                 and the key"

tunnel_pid=''    # of the ssh that this run started

# -----------------------------------------------------------------------------
# The page

# usage: handover ADDRESS    (prints a page that leads to the worker's; needs row)
# What stands behind # is sent to no server. The worker's page puts the key away, and takes it out
# of the address.
handover() {
  address="$1" fact "$row" '(if .key == "" then "" else "#key=\(.key | @uri)" end) as $key
    | "<!doctype html>\n<meta charset=\"utf-8\">\n<title>Bark</title>\n"
    + "<meta name=\"referrer\" content=\"no-referrer\">\n"
    + "<meta http-equiv=\"refresh\" content=\"0; url=\(env.address)/\($key)\">"'
}

# usage: write_handover ADDRESS FILE    (for this user alone)
write_handover() {
  (umask 077 && handover "$1" >"$2") || die "$EX_MISSING" "$2 cannot be written; see above"
}

# Prints the name of a program that opens files in a browser; fails if there is none.
find_browser() {
  local browser usual=xdg-open
  if [[ "$OSTYPE" == darwin* ]]; then usual=open; fi    # elsewhere that is another program
  for browser in "$usual" "${BROWSER:-}" wslview; do
    if has_tool "$browser"; then
      printf '%s\n' "$browser"
      return 0
    fi
  done
  return 1
}

make_readable_scratch() {
  local TMPDIR="${TMPDIR:-/tmp}"
  if has_tool snap; then TMPDIR=~; fi    # Ubuntu's browsers, from snaps, see no other /tmp
  make_scratch
}

# usage: show_page ADDRESS    (prints it)
show_page() {
  local browser file="$scratch/bark-worker.html"
  write_handover "$1" "$file"
  tell "$1/"
  if browser="$(find_browser)"; then
    (trap - PIPE && exec "$browser" "$file") </dev/null >/dev/null 2>&1 &
    say "$browser opens it; if it does not show, open this file in a browser here: $file"
  else
    say "no browser is found; open this file in one here: $file"
  fi
  say 'the file hands over the key and goes at the end; Ctrl-C ends this'
}

# -----------------------------------------------------------------------------
# Open

tunnel_lives() { [[ -n "$tunnel_pid" ]] && kill -0 "$tunnel_pid" 2>/dev/null; }

# At the end of this script, whatever ends it.
close_tunnel() {
  if tunnel_lives; then kill "$tunnel_pid" 2>/dev/null; fi
}

# usage: open_through_ssh PORT
open_through_ssh() {
  local ssh_host ssh_port ssh_words
  plan_tunnel "$1"
  make_readable_scratch
  (trap - PIPE && exec "${ssh_words[@]}") >"$scratch/address" &
  tunnel_pid=$!
  until [[ -s "$scratch/address" ]]; do
    tunnel_lives || die "$EX_UNHEALTHY" 'the tunnel did not open; what ssh says stands above'
    short_pause
  done
  show_page "http://127.0.0.1:$1"
  wait "$tunnel_pid" || true
  die "$EX_UNHEALTHY" "the tunnel ended by itself; run: $AGAIN open"
}

open_directly() {
  find_running
  make_readable_scratch
  say 'over the open net, in plain HTTP: whoever is on the way can read the texts and the key;' \
    'without --direct all of it goes through SSH'
  show_page "$address"
  while :; do pause 60; done
}

cmd_open() {
  local port="$WORKER_PORT" direct=''
  read_options open '--port=port --direct:direct' "$@"
  need_whole open --port "$port" 1 65535
  if [[ -z "$direct" ]]; then
    open_through_ssh "$((10#$port))"
  else
    if is_said --port; then usage_error '--port goes without --direct' open; fi
    open_directly
  fi
}

loaded="$loaded open"
