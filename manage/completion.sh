#!/usr/bin/env bash
# Tab completion for bash and zsh. Sourced by manage-bark-worker.sh when `completion` is called.
#
# Sections: completion
# Call vastai: none
# Call curl: none
# Change what is billed: none
#
# shellcheck source=manage-bark-worker.sh
if [[ -z "${PROGRAM:-}" ]]; then source "${BASH_SOURCE[0]%/*}/../manage-bark-worker.sh"; fi

# -----------------------------------------------------------------------------
# completion

readonly "USAGE_completion=usage: $PROGRAM completion bash|zsh

Prints what makes the shell complete commands and options:
  eval \"\$(./$PROGRAM completion bash)\""

# Prints the options of a command, by blanks: they are those that its help tells.
options_of() {
  local word second options=''
  while read -r word second _; do
    case "$word" in
      -?,) options="$options ${word%,} $second" ;;
      --*) options="$options $word" ;;
    esac
  done <<<"$(usage_of "$1")"
  printf '%s\n' "${options# }"
}

cmd_completion() {
  local command commands cases='' text
  read -r -d '' text <<'SH' || true
_manage_bark_worker() {
  local words=''
  case "$COMP_CWORD ${COMP_WORDS[1]:-}" in
    1\ * | 2\ help) words='@COMMANDS@' ;;
    2\ completion) words='bash zsh' ;;
    2\ endpoint) words='up status test logs down' ;;
@OPTIONS@
  esac
  COMPREPLY=($(compgen -W "$words" -- "${COMP_WORDS[COMP_CWORD]}"))
}
complete -o default -F _manage_bark_worker manage-bark-worker.sh ./manage-bark-worker.sh
SH
  case "${1:-}" in
    bash) ;;
    zsh) text="autoload -U +X compinit && compinit
autoload -U +X bashcompinit && bashcompinit
$text" ;;
    *) usage_error "completion is for bash or zsh, not '${1:-}'" completion ;;
  esac
  load hints
  commands="$(commands)"
  for command in $commands; do
    load "$command"
    cases="$cases"$'\n'"    *\ $command) words='$(options_of "$command")' ;;"
  done
  text="${text/@COMMANDS@/${commands//$'\n'/ }}"
  tell "${text/@OPTIONS@/${cases#$'\n'}}"
}

loaded="$loaded completion"
