#!/usr/bin/env bash
# Ways to a rented worker: a shell on its machine, a tunnel, its page in a browser. Sourced by
# manage-bark-worker.sh when one of these commands is called.
#
# Sections: constants and help; ssh, tunnel; the page; open
# Call vastai: none
# Call curl: none
# Change what is billed: none
#
# shellcheck source=manage-bark-worker.sh
if [[ -z "${PROGRAM:-}" ]]; then source "${BASH_SOURCE[0]%/*}/../manage-bark-worker.sh"; fi

# -----------------------------------------------------------------------------
# Constants and help

readonly "USAGE_ssh=usage: $PROGRAM ssh [ID] [COMMAND...]

Opens a shell on the instance, or runs COMMAND there; ID is one of several instances. Your key must
have been in your Vast account (https://cloud.vast.ai/manage-keys/) when the instance was rented.
Goes to the instance itself or, where that does not answer, through Vast's proxy, and takes a new
machine's host key as it comes: known_hosts beside the journal of orders keeps it (help start)."

readonly "USAGE_tunnel=usage: $PROGRAM tunnel [ID] [--port PORT]

Forwards a port of this machine to the worker through SSH until Ctrl-C, so that neither text nor key
crosses the net in clear.

  --port PORT    on this machine ($WORKER_PORT)
  ID             one of several instances"

readonly "USAGE_open=usage: $PROGRAM open [ID] [--port PORT | --direct]

Opens the worker's page in a browser of this machine, through SSH as tunnel does, until Ctrl-C. The
browser gets the key from a file that only this user can read and that goes at the end: it shows in
no address, list of processes, history or log.

  --port PORT    on this machine ($WORKER_PORT)
  --direct       over the open net instead, in plain HTTP: whoever is on the way can read the texts
                 and the key
  ID             one of several instances"

readonly CONNECT_SECONDS=10    # that a route may take; then the next is tried

routes=()        # to the instance, the best first
ssh_options=()   # what a tunnel needs
ssh_words=()     # the whole command
tunnel_pid=''    # of the ssh that this run started

# -----------------------------------------------------------------------------
# ssh, tunnel

# Sets routes, the direct one before that through Vast's proxy: HOST PORT NAME each.
find_ssh() {
  local state route
  need_instance
  routes=()
  while read -r route; do
    if [[ -n "$route" ]]; then routes+=("$route"); fi
  done <<<"$(fact "$row" '.ssh[]?')"
  state="$(fact "$row" .state)"
  [[ "$state" == running && ${#routes[@]} != 0 ]] ||
    die "$EX_UNHEALTHY" "the instance is $state, and Vast tells no SSH address of it (yet)"
  has_tool ssh ||
    die "$EX_MISSING" 'ssh is missing: sudo apt install openssh-client'
}

# usage: plan_ssh ROUTE LOCAL_COMMAND    (sets ssh_words; the command runs here once connected)
# An address is one instance's today and another's tomorrow: a host key is remembered for instance
# and route, in a file of our own, and that of a new one is taken as it comes.
plan_ssh() {
  local host port name folder
  read -r host port name <<<"$1"
  folder="$(state_folder)"
  (umask 077 && mkdir -p "$folder") 2>/dev/null || true    # else ssh says that it cannot write it
  ssh_words=(ssh -o StrictHostKeyChecking=accept-new -o CheckHostIP=no
    -o "UserKnownHostsFile=\"${folder//%/%%}/known_hosts\""
    -o "HostKeyAlias=vast-$(fact "$row" .id)-$name" -o "ConnectTimeout=$CONNECT_SECONDS"
    -o PermitLocalCommand=yes -o "LocalCommand=$2" ${ssh_options[@]+"${ssh_options[@]}"}
    -p "$port" "root@$host")
}

# usage: connect LOCAL_COMMAND [COMMAND...]    (by the first route that leads there; ends as ssh)
# Status 255 is also a remote command's: what tells that there was a connection is the local one.
connect() {
  local route mark status=255
  make_scratch
  mark="$scratch/connected"
  for route in "${routes[@]}"; do
    if ((status != 255)) || [[ -e "$mark" ]]; then break; fi
    plan_ssh "$route" ": >$(printf '%q' "${mark//%/%%}"); $1"
    status=0
    (trap - PIPE && exec "${ssh_words[@]}" "${@:2}") || status=$?
  done
  leave "$status"
}

cmd_ssh() {
  if [[ "${1:-}" =~ ^[0-9]{1,15}$ ]]; then
    target_id="$((10#$1))"
    shift
  fi
  find_ssh
  connect '' "$@"
}

# usage: plan_tunnel PORT    (sets ssh_options, after find_ssh)
plan_tunnel() {
  find_ssh
  ssh_options=(-N -o ExitOnForwardFailure=yes -o ServerAliveInterval=15
    -L "127.0.0.1:$1:127.0.0.1:$WORKER_PORT")
  say 'open until Ctrl-C once the address shows: your SSH key must have been in the Vast account' \
    'when the instance was rented, and a new instance may need a minute'
}

cmd_tunnel() {
  local port="$WORKER_PORT"
  read_target tunnel --port=port "$@"
  need_whole tunnel --port "$port" 1 65535
  port="$((10#$port))"
  plan_tunnel "$port"
  connect "echo http://127.0.0.1:$port"
}

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
  local route
  plan_tunnel "$1"
  make_readable_scratch
  for route in "${routes[@]}"; do
    plan_ssh "$route" "echo http://127.0.0.1:$1"
    (trap - PIPE && exec "${ssh_words[@]}") >"$scratch/address" &
    tunnel_pid=$!
    while [[ ! -s "$scratch/address" ]] && tunnel_lives; do short_pause; done
    if [[ -s "$scratch/address" ]]; then break; fi
  done
  [[ -s "$scratch/address" ]] ||
    die "$EX_UNHEALTHY" 'the tunnel did not open; what ssh says stands above'
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
  read_target open '--port=port --direct:direct' "$@"
  need_whole open --port "$port" 1 65535
  if [[ -z "$direct" ]]; then
    open_through_ssh "$((10#$port))"
  else
    if is_said --port; then usage_error '--port goes without --direct' open; fi
    open_directly
  fi
}

loaded="$loaded reach"
