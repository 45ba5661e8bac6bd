#!/usr/bin/env bash
# What a mistyped word may have meant. Sourced by manage-bark-worker.sh when it knows one not.
#
# Sections: hints
# Call vastai: none
# Call curl: none
# Change what is billed: none
#
# shellcheck source=manage-bark-worker.sh
if [[ -z "${PROGRAM:-}" ]]; then source "${BASH_SOURCE[0]%/*}/../manage-bark-worker.sh"; fi

# -----------------------------------------------------------------------------
# Hints

# usage: did_you_mean WORD CANDIDATES...    (prints the one that is few slips away, as a question)
# A slip is a letter too many, too few, another, or swapped with the next; or a part left out.
did_you_mean() {
  printf '%s\n' "$@" | awk 'NR == 1 {
      word = bare = $0; sub(/^-+/, "", bare); n = length(word); least = 1 + int((n + 2) / 4); next
    } {
      m = length($0)
      for (i = 0; i <= n; i++) for (j = 0; j <= m; j++) {
        if (i == 0 || j == 0) { slips[i, j] = i + j; continue }
        a = substr(word, i, 1); b = substr($0, j, 1)
        s = slips[i - 1, j - 1] + (a != b)
        if (slips[i - 1, j] + 1 < s) s = slips[i - 1, j] + 1
        if (slips[i, j - 1] + 1 < s) s = slips[i, j - 1] + 1
        if (i > 1 && j > 1 && a == substr($0, j - 1, 1) && b == substr(word, i - 1, 1) &&
          slips[i - 2, j - 2] + 1 < s) s = slips[i - 2, j - 2] + 1
        slips[i, j] = s
      }
      s = slips[n, m]
      if (s > 1 && length(bare) > 2 && index($0, bare)) s = 1
      if (s < least) { least = s; near = $0 }
    } END { if (near != "") print " (did you mean " near "?)" }' 2>/dev/null || true
}

# usage: near_option WORD SPEC    (of the options in SPEC, see read_options)
near_option() {
  if [[ "$1" != --* ]]; then return 0; fi
  # shellcheck disable=SC2046    # a word each
  did_you_mean "$1" $(feed "$2" tr ' ' '\n' | sed -n 's/[:=].*//; /^--/p')
}

# Prints the names of all commands, a line each.
commands() {
  local line
  while IFS= read -r line; do
    if [[ "$line" =~ ^\ \ ([a-z]+)\  ]]; then printf '%s\n' "${BASH_REMATCH[1]}"; fi
  done <<<"$USAGE"
}

# usage: near_command WORD
near_command() {
  # shellcheck disable=SC2046    # a word each
  did_you_mean "$1" $(commands)
}

loaded="$loaded hints"
