#!/usr/bin/env bash
# The rented worker's page in a browser. Sourced by manage-bark-worker.sh when `open` is called.
#
# Sections: constants and help; the page; open
# Call vastai: none
# Call curl: none
# Change what is billed: none
#
# shellcheck source=manage-bark-worker.sh
if [[ -z "${PROGRAM:-}" ]]; then source "${BASH_SOURCE[0]%/*}/../manage-bark-worker.sh"; fi

# -----------------------------------------------------------------------------
# Constants and help

readonly USAGE_OPEN="usage: $PROGRAM open [--port PORT | --direct]

Opens the worker's page in a browser of this machine, through SSH as tunnel does, until Ctrl-C. The
browser gets the key from a file that only this user can read and that goes at the end: it shows in
no address, list of processes, history or log.

  --port PORT    on this machine ($WORKER_PORT)
  --direct       over the open net instead, in plain HTTP: whoever is on the way can read the texts
                 and the key"

tunnel_pid=''    # of the ssh that this run started

# -----------------------------------------------------------------------------
# The page

# Opens the worker's page in another tab and tells it the key when it asks, and no page elsewhere.
# Behind the # of an address browsers would keep it in their history; without a click they block it.
readonly HANDOVER='<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Bark</title>
<p><button autofocus>Open the page with its key</button>
<p>Then this one can be closed.
<script>
const address = "@ADDRESS@", key = decodeURIComponent("@KEY@");
document.querySelector("button").onclick = () => {
  const page = open(address);
  addEventListener("message", ({source, data}) => {
    if (source === page && data === "bark-key?") page.postMessage({barkKey: key}, address);
  });
};
</script>'

# usage: write_handover ADDRESS FILE    (for this user alone; needs row)
write_handover() {
  local key text="${HANDOVER/@ADDRESS@/$1}"
  key="$(fact "$row" '.key | @uri')"
  (umask 077 && printf '%s\n' "${text/@KEY@/$key}" >"$2") ||
    die "$EX_MISSING" "$2 cannot be written; see above"
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
  local browser shown="$1/"
  if [[ -n "$(fact "$row" .key)" ]]; then
    shown="$scratch/bark-worker.html"
    write_handover "$1/" "$shown"
  fi
  tell "$1/"
  if browser="$(find_browser)"; then
    (trap - PIPE && exec "$browser" "$shown") </dev/null >/dev/null 2>&1 &
    say "$browser opens it; if it does not show, open this in a browser here: $shown"
  else
    say "no browser is found; open this in one here: $shown"
  fi
  say 'what hands over the key goes at the end; Ctrl-C ends this'
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
