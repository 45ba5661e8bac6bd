#!/usr/bin/env bash
# The workers that Vast itself starts, scales and ends. Sourced by manage-bark-worker.sh when
# `endpoint` is called. The endpoint's name is the label.
#
# Sections: constants and help; facts; adapters; what vast lists; up; down, and giving back; status,
#   logs; test
# Call vastai: none (all go through vast)
# Call curl: none (all go through call_url)
# Change what is billed: order_part delete_once remove_templates is_routed
#
# shellcheck disable=SC2016    # programs of jq stand in single quotes
# shellcheck source=manage-bark-worker.sh
if [[ -z "${PROGRAM:-}" ]]; then source "${BASH_SOURCE[0]%/*}/../manage-bark-worker.sh"; fi

# -----------------------------------------------------------------------------
# Constants and help

readonly "USAGE_endpoint=usage: $PROGRAM endpoint up|status|test|logs|down [OPTIONS]

More GPUs than one, and none while nobody speaks: Vast starts a worker when requests come, more of
them when they queue, and lets them go after 10 minutes without one. The endpoint is called
'$LABEL', or is the one of VASTAI_ENDPOINT_ID if that is set.

  up [OPTIONS]                make template, endpoint and worker group, after asking; prints
                              VASTAI_ENDPOINT_ID=... for an application's .env
  status [--json]             limits, workers, what it costs now; exit status 0 if it can serve
  test [TEXT] [OPTIONS]       speak along Vast's route; prints time queued, cold start, speed. A
                              TEXT that begins with a dash comes after --
  logs [--tail N]             what Vast and the workers say (the last 100 lines of each)
  down [--yes]                delete all of it, and look until nothing is left that is billed

options of up:
  --max-workers N        at most so many at a time (2)
${USAGE_SEARCH_OPTIONS/--interruptible*--image/--image}
  --model ID             suno/bark-small, builtin-voice, ... (suno/bark)
  --voice NAME           voice when a request names none (v2/en_speaker_6)
  --listen NAME          hear what was spoken, as for start (off)
  --yes                  do not ask, for scripts

options of test:
  --voice NAME           (the workers' own)
  --out FILE             (bark-test.wav)
  --timeout SECONDS      for all of it (1800)

options of status, logs:
  --json                 one object
  --tail N               the last N lines (100)

Settings of the worker in this environment go along:
$PASSED_ON;
BARK_MODEL, BARK_VOICE and BARK_LISTEN, where no option says otherwise."

readonly PYWORKER_PORT=3000
readonly INACTIVE_SECONDS=600    # without a request; then Vast lets every worker go
readonly SHOW_UP_SECONDS=20       # in which what was made has to stand in Vast's lists
RUN_URL="$CONSOLE_URL"           # as the CLI has it: one address, unless it is Vast's own
if [[ "$CONSOLE_URL" == 'https://console.vast.ai' ]]; then RUN_URL='https://run.vast.ai'; fi
readonly RUN_URL

max_workers=2
endpoints='[]' groups='[]'    # all of the account, as last listed, without keys
members='[]'                  # the instances that are workers of the endpoint, or may be
worker_list='[]'              # what Vast's autoscaler tells of its workers
endpoint_row=''               # the endpoint that is meant

# What `up` has made so far and gives back unless it comes to its end.
making=''                     # template, endpoint, worker group: while an order may be on its way
template_name=''              # drawn by this run
made_hash='' made_endpoint=''
endpoints_before=''           # ids, by blanks

# -----------------------------------------------------------------------------
# Facts: what jq makes of Vast's lists

readonly JQ_ENDPOINT='
def listed($ids): "\(.id)" as $id | any($ids | split(" ")[]; . == $id);
def is_meant: if env.wanted_endpoint != "" then "\(.id)" == env.wanted_endpoint
  else .endpoint_name == env.our_label end;
def limit: (.search_params // .search_query // "") | tostring
  | capture("dph_total ?<= ?(?<dollars>[0-9.]+)").dollars // null;
def member: instance + {marker: (environment.BARK_LABEL // ""), plain: ((.label // "") == "")};
def may_be_anyones: (objects | .label | strings) // "" | . == "";
def is_member: listed(env.workers) or (.marker != "" and .marker == env.marker);
# What only the workers of that endpoint have in their environment: its name, unless two share it.
def marker($id): (map(select("\(.id)" == $id))[0].endpoint_name // env.our_label) as $name
  | if any(.[]; .endpoint_name == $name and "\(.id)" != $id) then "" else $name end;
def is_group_left: ({id: .endpoint_id} | listed(env.ids))
  or (.template_hash as $hash | any(env.hashes | split(" ")[]; . == $hash));
def worker_status($list): "\(.id)" as $id | [$list[] | select("\(.id)" == $id)][0] // {};
# Of an endpoint, its worker groups, the list of the autoscaler and the instances.
def endpoint_status: . as [$endpoint, $groups, $list, $instances]
  | ($instances | map(select(.sure))) as $instances
  | {id: $endpoint.id, name: ($endpoint.endpoint_name // env.our_label),
     state: (if $endpoint then $endpoint.endpoint_state // "active" else "absent" end),
     max_workers: $endpoint.max_workers, cold_workers: $endpoint.cold_workers,
     inactivity_timeout: $endpoint.inactivity_timeout,
     worker_groups: ($groups | map({id, max_price: (limit | if . then tonumber else . end)})),
     workers: ($instances | map(worker_status($list) as $told | {id, gpu, region, instance: .state,
       status: ($told.status // "unknown"), characters_per_second: $told.measured_perf,
       price_per_hour: .price, costs_now: costs_now})),
     cost_per_hour: ($instances | map(costs_now) | add // 0)};
'

# usage: endpoint_facts FILTER [JQ_OPTIONS]
endpoint_facts() {
  wanted_endpoint="${VASTAI_ENDPOINT_ID:-}" facts "$JQ_ENDPOINT $1" "${@:2}"
}

# -----------------------------------------------------------------------------
# Adapters

# Prints the account's key, wherever the CLI takes it from.
account_key() {
  if [[ -n "${VAST_API_KEY:-}" ]]; then
    printf '%s\n' "$VAST_API_KEY"
  else
    tr -d ' \r\n' <"$(key_file)"
  fi
}

# usage: web KEY URL [JSON]    (GET, or POST of JSON; as `vast`, sets reply and complaint)
# For what the CLI hides, an endpoint's key, or has no command for.
web() {
  local said status
  complain
  reply=''
  if ! said="$(call_url "$1" "$2" "${3:-}" --max-time 60 -w '\n%{http_code}' 2>&1)"; then
    complain "no answer from ${2%%\?*}: $(feed "$said" grep '^curl:')"
    return 1
  fi
  tick
  status="${said##*$'\n'}" reply="${said%$'\n'*}"
  if [[ "$status" == 2?? ]]; then return 0; fi
  said="$(reply_says '.msg // .error // .error_msg // ""')"
  complain "Vast says: ${said:-${reply:0:200}} (HTTP $status)" "$status"
  return 1
}

# usage: web_json array|object KEY URL [BODY]
web_json() {
  web "${@:2}" || return 1
  if reply_is "$1"; then return 0; fi
  no_answer "$(reply_says '": \(.error_msg // empty)"')"
  return 1
}

# -----------------------------------------------------------------------------
# What Vast lists

# usage: list_rows endpoints|workergroups    (sets reply, to the rows by id)
list_rows() {
  vast show "$1" || return 1
  reply="$(feed "$reply" jq -c 'select(type == "array" and all(type == "object" and .id))
    | sort_by(.id)' 2>/dev/null)" || reply=''
  if [[ -n "$reply" ]]; then return 0; fi
  no_answer
  return 1
}

# Fails, with a complaint, if Vast does not answer.
look_endpoints() {
  list_rows endpoints || return 1
  endpoints="$reply"
  list_rows workergroups || return 1
  groups="$reply"
}

# usage: ids_of ROWS    (prints them, by blanks)
ids_of() { feed "$1" jq -r 'map("\(.id)") | join(" ")'; }

# Sets endpoint_row to the endpoint that is meant, or to nothing.
find_endpoint() {
  [[ "${VASTAI_ENDPOINT_ID:-0}" =~ ^[0-9]{1,18}$ ]] || die "$EX_USAGE" \
    "VASTAI_ENDPOINT_ID is '$VASTAI_ENDPOINT_ID'; it must be the number of an endpoint"
  persist look_endpoints || die_by_vast 'the endpoints cannot be listed'
  endpoint_row="$(feed "$endpoints" endpoint_facts 'map(select(is_meant)) | .[0] // empty
    | tojson')"
  if [[ -z "$endpoint_row" && -n "${VASTAI_ENDPOINT_ID:-}" ]]; then
    die "$EX_NO_INSTANCE" \
      "VASTAI_ENDPOINT_ID is $VASTAI_ENDPOINT_ID, and the account has no such endpoint; it has:
$(endpoint_names)
Set it to one of these numbers, or unset it for the endpoint called '$LABEL'"
  fi
}

# Prints those of the account, for people.
endpoint_names() {
  feed "$endpoints" jq -r 'map("\(.id) (\(.endpoint_name))") | join(", ")
    | if . == "" then "none" else . end'
}

no_endpoint() {
  die "$EX_NO_INSTANCE" "no endpoint is called '$LABEL'; the account has: $(endpoint_names)
To make one: $AGAIN endpoint up"
}

# Ends as no_instance, but says whether an endpoint has our name, and so bills too.
no_instance_but_perhaps_an_endpoint() {
  local what="whether an endpoint has that name is not known"
  if list_rows endpoints; then
    what="$(again="$AGAIN" feed "$reply" facts 'map(select(.endpoint_name == env.our_label).id)
      | if . == [] then "no endpoint has that name either: nothing is billed under it"
        else "but endpoint \(map(tostring) | join(", ")) has that name, and may bill:"
          + " \(env.again) endpoint status" end')"
  else
    what="$what: $complaint"
  fi
  no_instance "$what"
}

need_endpoint() {
  find_endpoint
  [[ -n "$endpoint_row" ]] || no_endpoint
}

# usage: endpoint_fact FILTER    (of the endpoint that is meant)
endpoint_fact() { feed "$endpoint_row" endpoint_facts "$1"; }

# usage: groups_of ENDPOINT_ID [TEMPLATE_HASH]    (its worker groups, or a template's)
groups_of() {
  id="$1" hash="${2:-}" feed "$groups" endpoint_facts 'map(select("\(.endpoint_id)" == env.id
    or (env.hash != "" and .template_hash == env.hash))) | tojson'
}

# usage: autoscaler_body ENDPOINT_ID [TAIL]    (what the CLI and the SDK send; the key, too)
autoscaler_body() {
  id="$1" tail="${2:-}" key="$(account_key)" jq -cn '{id: (env.id | tonumber), api_key: env.key}
    + if env.tail == "" then {} else {tail: (env.tail | tonumber)} end'
}

# usage: look_workers ENDPOINT_ID    (sets worker_list)
look_workers() {
  web_json array "$(account_key)" "$RUN_URL/get_endpoint_workers/" "$(autoscaler_body "$1")" ||
    return 1
  worker_list="$(feed "$reply" jq -c 'map(objects)')"
}

# usage: look_members IDS MARKER    (sets members: of those ids, or that the marker stands in, or
# that do not tell yet)
look_members() {
  local found
  list_instances || return 1
  if ! found="$(workers="$1" marker="$2" listed_rows 'map(
      if oddity == "" then member | .sure = is_member
      else odd_row + {plain: may_be_anyones, sure: listed(env.workers)} end
      | select(.sure or ((.known | not) and .plain))) | sort_by(.id)' "$JQ_ENDPOINT")"; then
    no_answer
    return 1
  fi
  members="$found"
}

# usage: marker_of ENDPOINT_ID
marker_of() { id="$1" feed "$endpoints" endpoint_facts 'marker(env.id)'; }

# -----------------------------------------------------------------------------
# up

parse_up() {
  local name
  read_options 'endpoint up' "$SEARCH_OPTIONS --max-workers=max_workers --model=model --voice=voice
 --listen=listen -y:agreed --yes:agreed" "$@"
  any_machine=yes
  for name in --interruptible --bid --any-machine; do
    if is_said "$name"; then
      usage_error "$name is not for endpoints: Vast rents their workers, on demand" endpoint
    fi
  done
  need_whole endpoint --max-workers "$max_workers" 1 100
  max_workers="$((10#$max_workers))"
  check_search endpoint
  check_worker endpoint
  if [[ "$image" == *@* ]]; then
    usage_error "--image is '$image'; a template of Vast's, which an endpoint needs, has a name and\
 a tag and no place for a digest: name a tag instead" endpoint
  fi
}

# What a worker of the endpoint runs: as the single one, behind Vast's PyWorker. What Vast may leave
# unset is set as Vast's own start script sets it.
endpoint_on_start() {
  printf '%s\n' "export WORKER_PORT=\"\${WORKER_PORT:-$PYWORKER_PORT}\"" \
    "export REPORT_ADDR=\"\${REPORT_ADDR:-$RUN_URL}\"" \
    "$TO_CONSOLE${LOOP/bark-worker.py/pyworker.py}"
}

# As container_env, without a key, as PyWorker passes none on, and without guards, as Vast itself
# ends workers. BARK_LABEL tells whose an instance is.
endpoint_env() {
  local text
  text="$(run_key=none idle_stop=0 start_limit=0 max_hours=0; container_env)"
  printf '%s\n' "-p $PYWORKER_PORT:$PYWORKER_PORT -e BARK_LABEL=$LABEL ${text#*BARK_API_KEY=none }"
}

endpoint_up() {
  local id
  parse_up "$@"
  if_cut='no endpoint was made'
  foretell_yes 'no endpoint is made'
  offer_vastai
  open_account
  find_endpoint
  id="$(endpoint_fact '.id // ""')"
  if [[ -n "$id" && "$(groups_of "$id")" != '[]' ]]; then
    say "$(endpoint_fact '"endpoint \(.id) is there already, \(.endpoint_state // "active"), with"
      + " at most \(.max_workers) workers"'), and stays as it is; for another, end it first:" \
      "$AGAIN endpoint down"
    announce_endpoint "$id"
    return 0
  fi
  find_offers
  say "the cheapest of today: $(feed "$offers" facts '.[0] | sentence')"
  say_cost_at_most
  agree 'Make the endpoint?' 'making an endpoint' made
  endpoints_before="$(feed "$endpoints" jq -r 'map(.id | tostring) | join(" ")')"
  make_template
  if [[ -z "$id" ]]; then
    make_endpoint
    id="$made_endpoint"
  fi
  make_group "$id"
  use_the_first "$id"
}

say_cost_at_most() {
  local most
  most="$(workers="$max_workers" feed null facts '(env.workers | tonumber)
    * (env.max_price | tonumber) | "\(fixed(2)) $/h (\(. * 24 | fixed(2)) $ a day)"')"
  say "at most $max_workers workers of at most $max_price \$/h: $most, and traffic, while requests
come; none after $((INACTIVE_SECONDS / 60)) minutes without one. Loading is billed, too, and at
first Vast may try workers without a request"
}

# usage: order_part WHAT WORDS...    (has Vast create it; ends, and so gives back, if refused)
order_part() {
  making="$1" if_cut=''
  vast create "${@:2}" || true
  if [[ -n "$complaint" ]] && is_clear_no; then die_by_vast "the $1 cannot be made"; fi
}

# usage: find_part WHAT CHECK    (what counts is that Vast lists it: ends unless CHECK finds it)
find_part() {
  local said="$complaint"
  said="${said:-$(reply_says '.msg // .error // empty')}"
  said="${said:-$reply}"
  if ! until_true "$SHOW_UP_SECONDS" 2 "$2"; then
    if [[ "$said" == *'not valid JSON'* ]]; then
      said="Vast says no, and its CLI does not tell why; has the key the permission user_write\
 (https://cloud.vast.ai/manage-keys/)?"
    fi
    said="${said:-no answer}"
    die "$EX_REFUSED" "the $1 cannot be made: ${said:0:200}"
  fi
  making=''
}

# Sets made_hash. The CLI prints Python and not JSON, and no error as one.
make_template() {
  template_name="$LABEL-endpoint-$(od -An -N 8 -tx1 /dev/urandom | tr -d ' \n')"
  order_part template template --name "$template_name" --image "${image%:*}" \
    --image_tag "${image##*:}" --env "$(endpoint_env)" --ssh --direct --disk_space "$disk" \
    --onstart-cmd "$(endpoint_on_start)" --search_params "$(hard_query) $(soft_query)"
  find_part template find_template
}

# Sets made_hash to the template of this run's name; fails if Vast does not list it.
find_template() {
  vast_json array search templates "name=$template_name" || return 1
  made_hash="$(name="$template_name" feed "$reply" facts 'map(select(.name == env.name))
    | .[0].hash_id // ""')"
  [[ -n "$made_hash" ]]
}

# Sets made_endpoint to one that has the limits that were asked for.
make_endpoint() {
  order_part endpoint endpoint --endpoint_name "$LABEL" --min_load 0 --min_cold_load 0 \
    --cold_workers 0 --max_workers "$max_workers" --inactivity_timeout "$INACTIVE_SECONDS" \
    --target_util 0.9 --cold_mult 1
  made_endpoint="$(reply_says 'select(.success) | .result // ""')"
  find_part endpoint find_made_endpoint
  until_true "$SHOW_UP_SECONDS" 2 shows_limits || die "$EX_REFUSED" \
    "Vast does not show endpoint $made_endpoint with the limits that were asked for"
}

find_made_endpoint() {
  look_endpoints || return 1
  if [[ -z "$made_endpoint" ]]; then made_endpoint="$(new_endpoints | head -n 1)"; fi
  [[ -n "$made_endpoint" ]]
}

shows_limits() {
  limits_hold "$made_endpoint" || { look_endpoints && limits_hold "$made_endpoint"; }
}

# Prints the ids of endpoints of our name that were not there before.
new_endpoints() {
  before="$endpoints_before" feed "$endpoints" endpoint_facts '.[]
    | select(.endpoint_name == env.our_label and (listed(env.before) | not)) | .id'
}

# usage: limits_hold ENDPOINT_ID    (as the last look found it)
limits_hold() {
  [[ "$(id="$1" most="$max_workers" idle="$INACTIVE_SECONDS" feed "$endpoints" \
    endpoint_facts 'any(.[]; "\(.id)" == env.id and .max_workers == (env.most | tonumber)
    and .cold_workers == 0
    and (.min_load // 0) == 0
    and (.inactivity_timeout // (env.idle | tonumber)) == (env.idle | tonumber))')" == true ]]
}

# usage: make_group ENDPOINT_ID
make_group() {
  order_part 'worker group' workergroup --endpoint_id "$1" --template_hash "$made_hash" \
    --gpu_ram "$min_vram" --search_params "$(hard_query) $(soft_query)"
  find_part 'worker group' find_group
}

find_group() { look_endpoints && [[ "$(groups_of '' "$made_hash")" != '[]' ]]; }

# usage: use_the_first ENDPOINT_ID    (another `up` at the same time may have made one before)
use_the_first() {
  local first
  first="$(id="$1" feed "$endpoints" endpoint_facts 'map(select(.endpoint_name == env.our_label
    or "\(.id)" == env.id) | .id) | min')"
  if [[ -n "$made_endpoint" && "$first" != "$1" ]]; then
    say "another run made endpoint $first before: this one goes"
    give_back_endpoint || leave "$EX_REFUSED"
  fi
  making='' made_hash='' made_endpoint=''
  announce_endpoint "$first"
}

# usage: announce_endpoint ID
announce_endpoint() {
  tell "VASTAI_ENDPOINT_ID=$1"
  if [[ -n "$reader_left" ]]; then say "nobody reads the answer, which is endpoint $1"; fi
  say "try it: $AGAIN endpoint test; end it: $AGAIN endpoint down"
}

# -----------------------------------------------------------------------------
# down, and giving back

give_back_endpoint() {
  local ids="$made_endpoint" marker='' failed=''
  [[ -n "$made_hash$made_endpoint$making" ]] || return 0
  say 'giving back what was made of the endpoint'
  if [[ -z "$made_hash" && -n "$template_name" ]]; then persist find_template || true; fi
  if [[ "$making" == endpoint && -z "$ids" ]]; then
    pause 2
    if persist look_endpoints; then ids="$(new_endpoints | tr '\n' ' ')"; else failed=yes; fi
  fi
  if [[ -n "$made_endpoint" ]]; then marker="$(marker_of "$made_endpoint")"; fi
  remove_endpoint "$ids" "$made_hash" "$marker" || failed=yes
  making='' made_hash='' made_endpoint=''
  if [[ -z "$failed" ]]; then
    say 'no endpoint was made'
    return 0
  fi
  say "see what is there, and end it: $(rescue endpoint status), then $(rescue endpoint down)"
  return 1
}

left_groups='' left_endpoints='' left_members='' left_unclear=''    # ids, a line each
known_workers=''                                                   # ids that Vast ever told

# usage: remove_endpoint ENDPOINT_IDS TEMPLATE_HASHES MARKER    (each joined by blanks)
# Deletes worker groups, endpoints and workers until Vast lists none of them in two looks. Deleting
# a group does not end its workers: they are asked for before, and destroyed one by one.
remove_endpoint() {
  local attempt clear=0 id
  known_workers=''
  for ((attempt = 1; attempt <= 10; attempt++)); do
    if ! see_what_is_left "$@"; then
      clear=0
    elif [[ -n "$left_groups$left_endpoints$left_members" ]]; then
      clear=0
      delete_what_is_left
    elif [[ -z "$left_unclear" ]] || ((attempt > 6)); then
      clear=$((clear + 1))
      if ((clear == 2)); then break; fi
    fi
    pause "$((attempt < 4 ? 2 : 5))"
  done
  if ((clear < 2)); then
    say_what_is_left
    return 1
  fi
  for id in $left_unclear; do
    say "instance $id comes up and does not tell whose it is; if it is nobody's, this ends it:" \
      "$(by_hand destroy instance "$id" -y)"
  done
  remove_templates "$2"
}

# usage: see_what_is_left ENDPOINT_IDS TEMPLATE_HASHES MARKER    (fails if Vast does not tell)
see_what_is_left() {
  local id
  look_endpoints || return 1
  for id in $1; do
    if look_workers "$id"; then known_workers="$known_workers $(ids_of "$worker_list")"; fi
  done
  look_members "${known_workers# }" "$3" || return 1
  left_endpoints="$(ids="$1" feed "$endpoints" endpoint_facts '.[] | select(listed(env.ids))
    | .id')"
  left_groups="$(ids="$1" hashes="$2" feed "$groups" endpoint_facts '.[]
    | select(is_group_left) | .id')"
  left_members="$(feed "$members" facts '.[] | select(.sure) | .id')"
  left_unclear="$(feed "$members" facts '.[] | select(.sure | not) | .id')"
}

# usage: delete_once OBJECT ID NAME
delete_once() {
  if ! vast delete "$1" "$2" && [[ "$refused" != 404 ]]; then say "$3 $2: $complaint"; fi
}

delete_what_is_left() {
  local id
  for id in $left_groups; do delete_once workergroup "$id" 'worker group'; done
  for id in $left_endpoints; do delete_once endpoint "$id" endpoint; done
  for id in $left_members; do destroy_once "$id" || true; done
}

# Each that is left, with the command that ends it.
say_what_is_left() {
  local id
  for id in $left_groups; do
    say "worker group $id may go on renting; this ends it: $(by_hand delete workergroup "$id")"
  done
  for id in $left_endpoints; do
    say "endpoint $id is still there; this ends it: $(by_hand delete endpoint "$id")"
  done
  if [[ -n "$left_members" ]]; then say_still_billed destroy "$left_members"; fi
  if [[ -z "$left_groups$left_endpoints$left_members" ]]; then
    say "Vast does not tell what is left ($complaint); see: $(by_hand show endpoints)," \
      "$(by_hand show workergroups) and $(by_hand show instances)"
  fi
}

# usage: remove_templates HASHES    (they cost nothing: one that stays is named, and that is all)
remove_templates() {
  local hash
  for hash in $1; do
    vast delete template --hash-id "$hash" || true
    if [[ -n "$complaint" || "$reply" == *[Ee]rror* ]]; then
      say "template $hash is still there, and free: ${complaint:-$reply}"
    fi
  done
}

endpoint_down() {
  local ids hashes marker="$LABEL"
  read_options 'endpoint down' '-y:agreed --yes:agreed' "$@"
  need_yes 'deleting an endpoint'
  open_account
  find_endpoint
  ids="$(feed "$endpoints" endpoint_facts 'map(select(is_meant) | "\(.id)") | join(" ")')"
  hashes="$(ids="$ids" feed "$groups" endpoint_facts 'map(select(
    ({id: .endpoint_id} | listed(env.ids))
    or (env.wanted_endpoint == "" and .endpoint_name == env.our_label))
    | .template_hash // empty) | unique | join(" ")')"
  if [[ -n "${VASTAI_ENDPOINT_ID:-}" ]]; then marker="$(marker_of "$VASTAI_ENDPOINT_ID")"; fi
  persist see_what_is_left "$ids" "$hashes" "$marker" || die_by_vast 'nothing is deleted'
  [[ -n "$left_endpoints$left_groups$left_members" ]] || no_endpoint
  say "$(feed "$endpoints" endpoint_facts '.[] | select(is_meant)
    | "endpoint \(.id): \(.endpoint_name)"'
    feed "$members" facts '.[] | select(.sure)
    | "worker \(.id): \(.state), \(.gpu)\(costs_now | known(", "))"')"
  agree 'Delete it, with its workers?' 'deleting an endpoint' deleted
  if_cut="the endpoint and its workers may still be billed; this ends it: $(rescue endpoint down)"
  remove_endpoint "$ids" "$hashes" "$marker" || leave "$EX_REFUSED"
  if_cut=''
  say "the endpoint is gone, with its worker groups and workers: nothing of it is billed any more"
}

# -----------------------------------------------------------------------------
# status, logs

endpoint_status() {
  local json='' id found verdict
  read_options 'endpoint status' --json:json "$@"
  open_account
  find_endpoint
  id="$(endpoint_fact .id)"
  if [[ -n "$id" ]]; then
    persist look_workers "$id" || die_by_vast 'the workers cannot be listed'
  fi
  persist look_members "$(ids_of "$worker_list")" \
    "$(marker_of "$id")" || die_by_vast 'the instances cannot be listed'
  found="$(status_of_endpoint "$id")"
  verdict="$(feed "$found" jq -r 'if .state == "active" and .worker_groups != [] then "serves"
    elif .id == null and .workers == [] then "absent" else "broken" end')"
  if [[ -n "$json" ]]; then tell "$found"
  elif [[ "$verdict" == absent ]]; then no_endpoint
  else tell "$(describe_endpoint "$found")"
  fi
  case "$verdict" in
    absent) leave "$EX_NO_INSTANCE" ;;
    broken) leave "$EX_UNHEALTHY" ;;
  esac
}

# usage: status_of_endpoint [ID]    (prints one object, for others to see)
status_of_endpoint() {
  printf '%s\n' "${endpoint_row:-null}" "$(groups_of "$1")" "$worker_list" "$members" |
    endpoint_facts 'endpoint_status | tojson' -s
}

# usage: describe_endpoint STATUS
describe_endpoint() {
  again="$AGAIN" feed "$1" facts '(if .id == null
    then "no endpoint is called \(.name), and workers of one that was are still there; to end them:"
      + " \(env.again) endpoint down"
    else "endpoint \(.id), \(.name): \(.state), at most \(.max_workers) workers"
    + (if (.cold_workers // 0) > 0 then " (\(.cold_workers) kept asleep, which cost storage)"
       else "" end)
    + (if .worker_groups == [] then "; it has no worker group, so no worker can start"
       else ([.worker_groups[].max_price | numbers] | max | if . then " of at most \(fixed(4)) $/h"
         else "" end) end) end)
    + "\n  now \(.cost_per_hour | fixed(4)) $/h"
    + (if .workers == [] then ": no worker" else "" end),
    (.workers[] | "  worker \(.id): \(.status), instance \(.instance), \(.gpu), \(.region)"
      + (.costs_now | known(", "))
      + if .characters_per_second then ", \(.characters_per_second | fixed(1)) characters/s"
        else "" end)'
}

endpoint_logs() {
  local tail=100 id
  read_options 'endpoint logs' --tail=tail "$@"
  need_whole endpoint --tail "$tail" 1 100000
  tail="$((10#$tail))"
  open_account
  need_endpoint
  id="$(endpoint_fact .id)"
  persist web_json object "$(account_key)" "$RUN_URL/get_endpoint_logs/" \
    "$(autoscaler_body "$id" "$tail")" ||
    die_by_vast "the endpoint's log cannot be had"
  tell "$(without_keys "$(feed "$reply" jq -r '.info0 // "", .info1 // "" | select(. != "")')" |
    tail -n "$tail")"
  persist look_workers "$id" || die_by_vast 'the workers cannot be listed'
  for id in $(feed "$worker_list" jq -r '.[].id'); do
    tell "-- worker $id"
    if vast logs "$id" --tail "$tail"; then
      tell "$(without_keys "$reply")"
    else
      say "$complaint"
    fi
  done
}

# -----------------------------------------------------------------------------
# test: one request along Vast's route. Vast names a worker and signs for it; the worker checks that

endpoint_test() {
  # shellcheck disable=SC2034    # keep_sound reads it
  local out
  local text spoken_voice took cold='no cold start: a worker was ready' ready_before=''
  local endpoint_key    # opens the way to its workers
  local route_reply request_index=0 queued_seconds
  load test
  timeout=1800
  parse_test 'endpoint test' --timeout=timeout "$@"
  need_whole endpoint --timeout "$timeout" 1 86400
  timeout="$((10#$timeout))"
  open_account
  need_endpoint
  make_scratch
  need_recruits
  find_endpoint_key
  # A queue that cannot be seen counts as a cold one.
  persist look_workers "$(endpoint_fact .id)" || worker_list='[]'
  if [[ "$(feed "$worker_list" jq 'any(.[]; (.status // "")
    | test("^(idle|ready|working|busy|active)$"; "i"))')" == true ]]; then ready_before=yes; fi
  if_cut="Vast may have started a worker, and ends it when idle; see: $AGAIN endpoint status"
  speak_along_route
  if [[ -z "$ready_before" ]]; then cold="cold start $queued_seconds s"; fi
  keep_sound "$took" "; queued $queued_seconds s, $cold"
}

# Ends if a request would wait for a worker that cannot come.
need_recruits() {
  local id state
  unpack "$(endpoint_fact '"\(.id)|\(.endpoint_state // "active")"')" id state
  [[ "$state" == active ]] || die "$EX_UNHEALTHY" "endpoint $id is $state, and starts no worker; \
to change that: $(by_hand update endpoint "$id" --endpoint_state active)"
  if [[ "$(groups_of "$id")" == '[]' ]]; then
    die "$EX_UNHEALTHY" \
      "endpoint $id has no worker group, so no worker can start; to make one: $AGAIN endpoint up"
  fi
}

# Sets endpoint_key of its caller, which the CLI hides.
find_endpoint_key() {
  persist web_json object "$(account_key)" "$CONSOLE_URL/api/v0/endptjobs/?client_id=me" ||
    die_by_vast "the endpoint's key cannot be had"
  endpoint_key="$(id="$(endpoint_fact .id)" feed "$reply" facts '.results[]?
    | select("\(.id)" == env.id) | .api_key // ""')"
  [[ "$endpoint_key" =~ ^[A-Za-z0-9._~-]+$ ]] ||
    die "$EX_REFUSED" "Vast tells no key of endpoint $(endpoint_fact .id)"
}

# Asks for a worker until one has spoken, the time is up, or the worker says no. Sets took and
# queued_seconds of its caller.
speak_along_route() {
  local deadline=$((now + timeout)) began=$now status
  while :; do
    await_route "$deadline"
    queued_seconds=$((now - began))
    status="$(ask_worker)"
    case "$status" in
      '200 '*) break ;;
      '000'* | '408 '* | '429 '* | '5'*)    # it is gone or full: the next one may do
        if ((now >= deadline)); then
          die "$EX_LATE" "no worker spoke within $timeout s; the last said HTTP ${status%% *}"
        fi
        say "the worker says HTTP ${status%% *}: asking for another"
        request_index=0
        pause 2 ;;
      *) die "$EX_UNHEALTHY" "the worker refuses (HTTP ${status%% *}): $(jq -r \
        '.error.message? // .error? // .' "$scratch/answer" 2>/dev/null || true)" ;;
    esac
  done
  took="${status#* }"
  jq -er '.audio | strings' "$scratch/answer" 2>/dev/null | base64 --decode >"$scratch/sound" ||
    die "$EX_UNHEALTHY" 'the worker answered without audio'
}

# usage: await_route DEADLINE
await_route() {
  phase='no worker is ready; Vast starts one' wait_began=$now wait_limit=$(($1 - now)) gpu_price=''
  until_true "$(($1 - now))" "$((POLL < 5 ? POLL : 5))" is_routed ||
    die "$EX_LATE" "no worker was ready within $timeout s${complaint:+: $complaint}; what Vast \
does: $AGAIN endpoint logs; what it costs: $AGAIN endpoint status"
}

# Asks for a worker. Sets, of the test, route_reply: a worker's address and the signature for it;
# and request_index: Vast's number of the request.
is_routed() {
  local url="$RUN_URL/route/?api_key=$endpoint_key" body
  body="$(key="$endpoint_key" cost="${#text}" index="$request_index" name="$(endpoint_fact \
    .endpoint_name)" jq -cn '{endpoint: env.name, api_key: env.key, cost: (env.cost | tonumber),
      request_idx: (env.index | tonumber), replay_timeout: 60}')"
  if persist web_json object "$endpoint_key" "$url" "$body"; then
    route_reply="$reply"
    request_index="$(feed "$reply" facts '.request_idx // 0')"
    if [[ "$(feed "$reply" facts '.url // ""')" =~ ^https?://[^/] ]]; then return 0; fi
  elif [[ "$refused" == 4* ]]; then
    die_by_vast 'Vast routes no request of this endpoint'
  fi
  show_phase
  return 1
}

# Sends the text to the worker that Vast named; prints HTTP status and seconds.
ask_worker() {
  local body
  body="$(printf '%s' "$text" | VOICE="$spoken_voice" route="$route_reply" jq -Rsc "$JQ_SPOKEN"'
    {auth_data: (env.route | fromjson), session_id: null, payload: spoken}')"
  call_url '' "$(fact "$route_reply" .url)/synthesize" "$body" --max-time 660 \
    -o "$scratch/answer" -w '%{http_code} %{time_total}' 2>"$scratch/err" || true
}

cmd_endpoint() {
  local hint=''
  case "${1:-}" in
    up | status | test | logs | down) "endpoint_$1" "${@:2}" ;;
    '') usage_error 'endpoint needs one of: up, status, test, logs, down' endpoint ;;
    *)
      if can_load hints; then hint="$(did_you_mean "$1" up status test logs down)"; fi
      usage_error "endpoint knows no '$1'$hint; it knows up, status, test, logs, down" endpoint ;;
  esac
}

loaded="$loaded endpoint"
