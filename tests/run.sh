#!/usr/bin/env bash
# Sets up .venv and runs the tests, on all cores: at most 5 minutes on two idle ones. Needs no root and no daemon.
#   bash tests/run.sh [--quick | --full] [pytest arguments]
#     --quick       the fast tests alone: a minute
#     --full        every case of the tests that otherwise take one in 25 of theirs: about an hour
#   NORIA_TEST_WORKERS=1    processes that run tests (default: a process a core, 8 at most)
set -euo pipefail

cd "$(dirname "$0")/.."
bash jobs/local/setup.sh test
source jobs/local/environment.sh

# Several times what the tests may take, so that only a hang meets the limit and not a busy machine.
limit=45m which=""
case ${1:-} in
    --quick) limit=10m which="not slow and "; shift ;;
    --full) limit=4h; export NORIA_TEST_FULL=1; shift ;;
esac
cores=$(nproc)
workers=${NORIA_TEST_WORKERS:-$((cores < 8 ? cores : 8))}

# An interrupt rather than a kill, so that pytest still says which test it was in. --foreground: Ctrl-C reaches pytest.
tests() { timeout --foreground --signal=INT --kill-after=60 "$limit" python -m pytest --durations=20 "$@"; }

# What measures time or memory has the machine to itself. pytest's 5: no test was asked for in that half.
together=0 alone=0
tests --numprocesses "$workers" --dist loadgroup --no-loadscope-reorder -m "${which}not alone" "$@" || together=$?
[ "$together" -le 1 ] || [ "$together" -eq 5 ] || exit "$together"
tests -m "${which}alone" "$@" || alone=$?
if [ "$together" -eq 5 ]; then exit "$alone"; fi
if [ "$alone" -eq 5 ]; then exit "$together"; fi
exit $((together > alone ? together : alone))
