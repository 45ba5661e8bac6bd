#!/usr/bin/env bash
# Has the rented worker speak, and checks what it says. Sourced by manage-bark-worker.sh when `test`
# is called, or `endpoint test`.
#
# Sections: constants and help; test
# Call vastai: none
# Call curl: none (all go through call_url)
# Change what is billed: none
#
# shellcheck disable=SC2016    # programs of jq stand in single quotes
# shellcheck source=manage-bark-worker.sh
if [[ -z "${PROGRAM:-}" ]]; then source "${BASH_SOURCE[0]%/*}/../manage-bark-worker.sh"; fi

# -----------------------------------------------------------------------------
# Constants and help

readonly "USAGE_test=usage: $PROGRAM test [TEXT] [OPTIONS]

Speaks TEXT, writes a WAV file, checks it and prints how long it took. A TEXT that begins with a
dash comes after --.

  --voice NAME    (the worker's own)
  --out FILE      (bark-test.wav)
  --play          play it here
  --id ID         of one of several instances"

readonly AUDIBLE=300              # of 32768; a sound whose largest sample is below is silence

# The seconds of a WAV file, from the bytes of its header; else what is wrong with it.
readonly JQ_SOUND='
def number($at): .[$at] + 256 * .[$at + 1] + 65536 * .[$at + 2] + 16777216 * .[$at + 3];
def wav_seconds($size):
  if length < 44 or .[0:4] != [82, 73, 70, 70] or .[8:12] != [87, 65, 86, 69] then
    "it is no WAV file"
  elif number(4) != $size - 8 or number(40) != $size - 44 then "its header tells another size"
  elif .[20] != 1 or .[22] != 1 or .[34] != 16 then "it is not 16-bit mono PCM"
  elif number(40) == 0 then "it is empty"
  else number(40) / number(28) end;
def speed($took; $seconds): "\($seconds | fixed(2)) s of speech in \($took | fixed(2)) s,"
  + " real-time factor \($took / $seconds | fixed(2))";
'

# -----------------------------------------------------------------------------
# test

readonly SENTENCE='If you can hear this, everything is working.'    # is understood in every voice
# A seed drawn anew, as a worker answers what it was asked before from memory.
readonly JQ_SPOKEN='def spoken: {text: ., seed: -1}
  + if env.VOICE != "" then {voice: env.VOICE} else {} end;'

# usage: parse_test COMMAND SPEC ARGUMENTS...    (COMMAND is test or `endpoint test`)
# Sets text, spoken_voice and out of its caller.
parse_test() {
  local command="$1" help="${1%% *}" spec="$2"
  shift 2
  spoken_voice='' out=bark-test.wav
  read_options "$command" "WORD --voice=spoken_voice --out=out $spec" "$@"
  if ((${#operands[@]} > 1)); then
    usage_error "$command takes one TEXT; put it in quotes" "$help"
  fi
  text="${operands[0]-$SENTENCE}"
  [[ "$text" == *[![:space:]]* ]] ||
    usage_error "TEXT is '$text'; there is nothing to speak in it" "$help"
  check_out "$help"
}

# usage: check_out COMMAND    (before anything costs money)
check_out() {
  local folder=./ written why=''
  if [[ "$out" == */* ]]; then folder="${out%/*}/"; fi
  written="$folder"
  if [[ -e "$out" ]]; then written="$out"; fi
  if [[ -d "$out" ]]; then why='it is a folder; name a file in it'
  elif [[ ! -d "$folder" ]]; then why="there is no folder $folder; make it, or name another file"
  elif [[ ! -w "$written" ]]; then why='you may not write there; name another file'
  fi
  if [[ -n "$why" ]]; then usage_error "--out $out cannot be written: $why" "$1"; fi
}

cmd_test() {
  local text spoken_voice out play='' took
  parse_test test '--play:play --id=target_id' "$@"
  [[ "$target_id" =~ ^[0-9]{0,15}$ ]] ||
    usage_error "--id is '$target_id'; it must be the number of an instance" test
  find_running
  make_scratch
  took="$(speak_text)" || leave "$?"
  keep_sound "$took"
  if [[ -n "$play" ]]; then play_sound "$out"; fi
}

# usage: keep_sound SECONDS [REMARK]    (checks what was spoken, copies it to --out and tells the
# speed; some locales write the seconds with a comma)
keep_sound() {
  local seconds
  seconds="$(check_sound "$scratch/sound")" || die "$EX_UNHEALTHY" "the sound is no good: $seconds"
  cp -- "$scratch/sound" "$out" || die "$EX_MISSING" "$out cannot be written; cp says why above"
  tell "$out: $(feed null facts "$JQ_SOUND speed(${1/,/.}; $seconds)")${2:-}"
}

# Has the worker at address say text; leaves the answer in $scratch/sound and prints the seconds.
speak_text() {
  local status body took
  body="$(printf '%s' "$text" | VOICE="$spoken_voice" jq -Rsc "$JQ_SPOKEN"' spoken')"
  took="$(call_url "$(fact "$row" .key)" "$address/synthesize" "$body" --max-time 660 \
    -o "$scratch/sound" -w '%{http_code} %{time_total}' -H 'Accept: audio/wav' \
    2>"$scratch/err")" ||
    die "$EX_UNHEALTHY" "$address does not speak: $(tail -n 1 "$scratch/err")"
  status="${took%% *}" took="${took#* }"
  [[ "$status" == 200 ]] || die "$EX_UNHEALTHY" "$address refuses (HTTP $status): $(jq -r \
    '.error.message' "$scratch/sound" 2>/dev/null || head -c 200 "$scratch/sound")"
  printf '%s\n' "$took"
}

# Prints the seconds of a WAV file; fails, and prints what is wrong, unless it is whole and audible.
check_sound() {
  local size seconds
  size="$(wc -c <"$1")"
  seconds="$(od -An -v -N 44 -t u1 "$1" | facts "$JQ_SOUND wav_seconds($size)" -s)"
  printf '%s\n' "$seconds"
  [[ "$seconds" =~ ^[0-9.]+$ ]] || return 1
  if (($(peak_of "$1") < AUDIBLE)); then
    printf 'and silent\n'
    return 1
  fi
}

# Prints the largest sample of a 16-bit WAV file, 0 to 32768.
peak_of() {
  tail -c +45 "$1" | od -An -v -t d2 |
    jq -n 'reduce inputs as $sample (0; [., $sample, -$sample] | max)'
}

# Prints the name of a program that plays WAV files; fails if there is none.
find_player() {
  local player
  for player in aplay afplay paplay ffplay; do
    if has_tool "$player"; then
      printf '%s\n' "$player"
      return 0
    fi
  done
  return 1
}

play_sound() {
  local player
  player="$(find_player)" || die "$EX_MISSING" "no player found (aplay, afplay, paplay or ffplay);\
 the sound is in $1"
  if [[ "$player" == ffplay ]]; then player='ffplay -nodisp -autoexit'; fi
  $player "$1" >&2
}

loaded="$loaded test"
