#!/usr/bin/env bash
# Runs the checks that take too long for run.sh. Arguments go to pytest. Needs what run.sh needs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=/dev/null    # it is checked by itself
source manage/local.sh

# axe-core judges what the page's markup tells a screen reader; PyPI has it in drivers alone.
ensure_axe() {
  local package='axe-core@4.14.1' folder="$VENV/axe-core"
  if [[ -e "$folder/axe.min.js" ]] || ! command -v npm >/dev/null; then return 0; fi
  say "fetching $package"
  mkdir -p "$folder"
  (cd "$folder" && npm pack --silent "$package" >/dev/null) ||
    die "$EX_MISSING" "npm could not fetch $package. Run this again when that is mended"
  tar -xzf "$folder"/axe-core-*.tgz -C "$folder" --strip-components 1 package/axe.min.js
}

ensure_venv "$ROOT/requirements.txt" "$ROOT/tests/requirements.txt"
ensure_venv "$ROOT/tests/requirements-model.txt"    # by itself, as its hash would be asked of all
ensure_axe
exec .venv/bin/python -m pytest -m long -rs "$@"
