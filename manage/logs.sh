#!/usr/bin/env bash
# What the worker prints. Sourced by manage-bark-worker.sh when `logs` is called.
#
# Sections: help; logs
# Call vastai: none (all go through vast)
# Call curl: none
# Change what is billed: none
#
# shellcheck source=manage-bark-worker.sh
if [[ -z "${PROGRAM:-}" ]]; then source "${BASH_SOURCE[0]%/*}/../manage-bark-worker.sh"; fi

# -----------------------------------------------------------------------------
# Help

readonly USAGE_LOGS="usage: $PROGRAM logs [ID] [OPTIONS]

  -f, --follow    go on printing new lines until Ctrl-C
  -n, --tail N    the last N lines (1000)
  --daemon        what Vast's daemon says of the container instead
  ID              one of several instances"

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

loaded="$loaded logs"
