#!/usr/bin/env bash
# Sets up .venv and runs the tests: at most 15 minutes on two idle cores, with --quick at most 2. Needs no root and no daemon.
#   bash tests/run.sh [--quick] [pytest arguments]
set -euo pipefail

cd "$(dirname "$0")/.."
bash jobs/local/setup.sh test
source jobs/local/environment.sh

limit=45m
if [ "${1:-}" = --quick ]; then
    shift
    limit=6m
    set -- -m "not slow" "$@"
fi
# Three times what the tests may take, so that only a hang meets the limit and not a busy machine.
# An interrupt rather than a kill, so that pytest still says which test it was in. --foreground: Ctrl-C reaches pytest.
exec timeout --foreground --signal=INT --kill-after=60 "$limit" python -m pytest "$@"
