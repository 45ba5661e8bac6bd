#!/usr/bin/env bash
# What the account has and what all of it costs: its credit, `status --all`. Sourced by
# manage-bark-worker.sh for these; where it is missing, nothing is said of the credit.
#
# Sections: credit; all that bills
# Call vastai: none (all go through vast and run_vast)
# Call curl: none
# Change what is billed: none
#
# shellcheck disable=SC2016    # programs of jq stand in single quotes
# shellcheck source=manage-bark-worker.sh
if [[ -z "${PROGRAM:-}" ]]; then source "${BASH_SOURCE[0]%/*}/../manage-bark-worker.sh"; fi

# -----------------------------------------------------------------------------
# Credit

readonly CREDIT_SECONDS=3    # that its answer is waited for when all else is there

credit=''    # in dollars; nothing where Vast does not tell, or the key may not know it

# Begins to ask for it, beside what else is asked. The CLI makes its folders when it starts, and
# breaks if another call makes them just then.
ask_credit() {
  mkdir -p "$(xdg_folder "${XDG_CONFIG_HOME:-}" .config)/vastai" \
    "$(xdg_folder "${XDG_CACHE_HOME:-}" .cache)/vastai" \
    "$(xdg_folder "${XDG_STATE_HOME:-}" .local/state)/vastai" 2>/dev/null || true
  exec 8< <({ run_vast show user | tail -n +4 | jq -r 'objects
    | if has("credit") then .credit else .balance end | numbers'; } 2>/dev/null)
}

# Sets credit, after ask_credit.
hear_credit() {
  IFS= read -r -t "$CREDIT_SECONDS" -u 8 credit || true
  exec 8<&-
  [[ "$credit" =~ ^-?[0-9.]+$ ]] || credit=''
}

# usage: say_credit DOLLARS_PER_HOUR    (after ask_credit)
say_credit() {
  hear_credit
  if [[ -n "$credit" ]]; then say "$(credit_words "$1")"; fi
}

# usage: credit_words DOLLARS_PER_HOUR    (prints it with how long it lasts then)
credit_words() {
  credit="$credit" price="${1:-0}" feed null facts '(env.credit | tonumber) as $credit
    | (env.price | tonumber? // 0) as $price
    | if $credit <= 0 then "the account has no credit left (\($credit) $)"
      else "credit \($credit | fixed(2)) $" + if $price > 0 then ($credit / $price) as $hours
        | ", which lasts "
          + (if $hours < 48 then $hours | span else "\($hours / 24 | fixed(1)) days" end)
          + " at \($price | fixed(4)) $/h" else "" end end'
}

# -----------------------------------------------------------------------------
# All that bills

readonly JQ_ACCOUNT='
# An instance is ours by its label; the worker of an endpoint of ours has that in its environment.
def label_of: (objects | .label | strings) // "" | clean;
def is_ours: label_of == env.our_label
  or ((try environment.BARK_LABEL catch null) == env.our_label and label_of == "");
def billed_instance: label_of as $name | is_ours as $ours
  | (if oddity == "" then instance else odd_row end)
  | {kind: "instance", id, label: $name, ours: $ours, state,
    what: "\(.gpu)\(if .region == "" then "" else ", " + .region end)", costs_now: costs_now};
def billed_volume: {kind: "volume", id, label: label_of, ours: false, state: (.status | clean),
  what: "\(.disk_space // "?") GB\(.geolocation | clean | if . == "" then "" else ", " + . end)",
  costs_now: ((try storage catch null) | numbers // null)};
def account: {label: env.our_label, billed: ., cost_per_hour: (map(.costs_now) | add // 0)}
  | .cost_per_day = .cost_per_hour * 24
  | .without_price = (.billed | map(select(.costs_now == null).id));
'

# usage: status_all JSON    (yes or nothing; fails if Vast does not tell all)
status_all() {
  local found volumes='[]' missing=''
  open_account
  ask_credit
  persist list_instances || die_by_vast 'the instances cannot be listed'
  if persist vast_json array show volumes; then
    volumes="$reply"
  else
    missing="what volumes the account has is not known: $complaint"
  fi
  found="$(volumes="$volumes" listed_rows 'map(billed_instance)
    + (env.volumes | fromjson | map(objects | billed_volume)) | account' "$JQ_ACCOUNT")" ||
    die "$EX_REFUSED" "Vast's lists cannot be read"
  hear_credit
  if [[ -n "$1" ]]; then
    tell "$(credit="$credit" feed "$found" facts 'with_credit | tojson')"
  else
    tell "$(describe_account "$found")"
  fi
  if [[ -n "$missing" ]]; then die "$EX_UNHEALTHY" "$missing"; fi
}

# usage: describe_account FOUND
describe_account() {
  fact "$1" '(.billed[] | "\(if .ours then "ours: " else "      " end)\(.kind) \(.id)"
      + (if .label == "" or .ours then "" else " (\(.label))" end)
      + ": \([.state, .what] | map(select(. != "")) | join(", "))\(.costs_now | known(", "))"),
    "in all \(.cost_per_hour | fixed(4)) $/h, \(.cost_per_day | fixed(2)) $ a day, and traffic"
      + if .without_price == [] then "" else "; without \(.without_price | map(tostring)
        | join(", ")), of which Vast tells no price" end'
  if [[ -n "$credit" ]]; then credit_words "$(fact "$1" .cost_per_hour)"; fi
}

loaded="$loaded account"
