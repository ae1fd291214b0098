#!/usr/bin/env bash
# Sets up .venv and holds the tree to ruff (lint and format), src to mypy and what jobs use of it to what is there, with
# the versions of the test extra.
#   bash tests/style.sh [--fix]      --fix: first what ruff can mend itself
set -euo pipefail

cd "$(dirname "$0")/.."
bash jobs/local/setup.sh test
source jobs/local/environment.sh

if [ "${1:-}" = --fix ]; then
    ruff check --quiet --fix . || true
    ruff format --quiet .
fi
failed=0
# All of them, so that one run says everything. mypy: src, by the settings in pyproject.toml.
ruff check . || failed=1
ruff format --check . || failed=1
mypy || failed=1
mypy --config-file tests/scripts.ini || failed=1
exit "$failed"
