#!/usr/bin/env bash
# Runs every quick check: linters of code, image and workflows, then pytest, which gets the
# arguments: tests/run.sh -k voice
# Beyond pip it needs Python 3.11 or newer with its venv module, curl and jq.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=/dev/null    # it is checked by itself
source manage/local.sh

failed=''

# usage: step NAME COMMAND...    (a failure is kept, so that every check is seen)
step() {
  local name="$1" began=$SECONDS result=passed
  shift
  "$@" || { result=FAILED; failed="$failed $name"; }
  say "-- $name $result in $((SECONDS - began)) s"
}

for tool in curl jq; do
  command -v "$tool" >/dev/null ||
    die "$EX_MISSING" "$tool is missing; on Debian or Ubuntu: sudo apt install $tool"
done
step venv ensure_venv "$ROOT/requirements.txt" "$ROOT/tests/requirements.txt"
step ruff .venv/bin/ruff check .
step shellcheck xargs -n 1 -P 2 .venv/bin/shellcheck -x \
  < <(printf '%s\n' manage-bark-worker.sh manage/*.sh tests/*.sh .ci/run)
step hadolint .venv/bin/hadolint Dockerfile.ghcr
step compose .venv/bin/check-jsonschema --builtin-schema vendor.compose-spec compose.yaml
step workflows .venv/bin/check-jsonschema --builtin-schema vendor.github-workflows \
  .github/workflows/*.yml
step dependabot .venv/bin/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
step zizmor .venv/bin/zizmor --offline --no-progress --quiet .github
step pytest .venv/bin/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder \
  -m 'not long' "$@"
say "-- $SECONDS s in all"
if [[ -n "$failed" ]]; then
  say "-- failed:$failed"
  exit 1
fi
