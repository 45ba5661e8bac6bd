#!/usr/bin/env bash
# The offers that `start` would consider, and what would let others in. Sourced by
# manage-bark-worker.sh for `search`, and where no offer fits.
#
# Sections: help; search; advice
# Call vastai: none (all go through vast)
# Call curl: none
# Change what is billed: none
#
# shellcheck disable=SC2016    # programs of jq stand in single quotes
# shellcheck source=manage-bark-worker.sh
if [[ -z "${PROGRAM:-}" ]]; then source "${BASH_SOURCE[0]%/*}/../manage-bark-worker.sh"; fi

# -----------------------------------------------------------------------------
# Help

readonly "USAGE_search=usage: $PROGRAM search [OPTIONS]

Prints the offers that start would consider, in its order: the cheapest first, but of those within
10 % of its price the most reliable.

$USAGE_SEARCH_OPTIONS"

# -----------------------------------------------------------------------------
# Search

offer_line() { printf '%-8s %-15.15s %3s %7s %6s %-14s %6s %5s %7s\n' "$@"; }    # 79 columns

cmd_search() {
  read_options search "$SEARCH_OPTIONS" "$@"
  check_search search
  offer_vastai
  open_account
  find_offers
  tell "$(offer_table)"
}

offer_table() {
  local cells=()
  offer_line OFFER GPU GB '$/HOUR' '$/DAY' WHERE RELIAB 'Mb/s' '$/GB IN'
  while IFS='|' read -r -a cells; do
    offer_line "${cells[@]}"
  done < <(feed "$offers" facts '.[] | [.id, .gpu, (.vram | round), (.cost | fixed(4)),
    (.cost * 24 | fixed(2)), .region[-14:], (.reliability | fixed(3)), (.down | round),
    (.traffic | fixed(3))] | join("|")')
}

# -----------------------------------------------------------------------------
# Advice

readonly JQ_SEARCH='
# The options that keep an offer out, each with the value that would let it in.
def country: .region | split(" ") | last // "";
def widenings: . as $offer
  | [if .winning then empty else "--bid \(.min_bid)" end,
     if .cost > (env.max_price | tonumber) then "--max-price \(.cost * 100 | ceil / 100)"
     else empty end,
     if .traffic > (env.max_traffic | tonumber)
     then "--max-traffic \(.traffic * 1000 | ceil / 1000)" else empty end,
     if .vram < (env.min_vram | tonumber) * 1000 / 1024 then "--min-vram \(.vram | floor)"
     else empty end,
     if env.gpus != "" and (.gpu | is_one_of(env.gpus | split(",")) | not)
     then "--gpu \(.gpu | @sh)" else empty end,
     if env.region != "" and (country | is_one_of(env.region | split(",")) | not)
     then "--region \(country)" else empty end,
     if .reliability <= (env.min_reliability | tonumber)
     then "--min-reliability \((.reliability - 0.0001) * 1000 | floor / 1000)" else empty end];
'

# Says what Vast has that does not fit, and which options would let it in.
say_what_would_fit() {
  local advice
  pause 1
  search_offers "$(hard_query)" 500
  say "no offer fits; Vast has $(feed "$offers" facts length) with one GPU, $disk GB of disk," \
    "a fast line and a driver for the image"
  advice="$(widening_advice)"
  if [[ -n "$advice" ]]; then say "$advice"; fi
}

# Prints, for each option, what widening it alone would bring, then the nearest offer of all.
widening_advice() {
  feed "$offers" facts "$JQ_SEARCH"'map(. + {wide: widenings} | select(.wide != []))
    | if . == [] then empty else
      (map(select(.wide | length == 1)) | group_by(.wide[0] | split(" ")[0])
        | map(min_by(.cost)) | sort_by(.cost)[] | "  with \(.wide[0]): \(sentence)"),
      (min_by([(.wide | length), .cost]) | "the nearest: \(.wide | join(" ")): \(sentence)")
      end'
}

loaded="$loaded search"
