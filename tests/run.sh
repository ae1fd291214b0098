#!/usr/bin/env bash
# Sets up .venv and runs the tests, on all cores: at most 5 minutes on two idle ones. Needs no root and no daemon.
#   bash tests/run.sh [--quick | --full | --published | --floors] [pytest arguments]
#     --quick       only the fast tests: a minute
#     --full        every case of the tests that otherwise take one in 25 of theirs
#     --published   a published chat model beside transformers, token by token: fetches 93 MB once, 3 minutes
#     --floors      the fast tests with the least versions that pyproject.toml allows, in an environment of their own
#   NORIA_TEST_WORKERS=1    processes that run tests (default: one a core, 8 at most)
set -euo pipefail

cd "$(dirname "$0")/.."
mode=
case ${1:-} in
    --quick | --full | --published | --floors) mode=$1; shift ;;
esac
if [ "$mode" = --floors ]; then exec bash tests/floors.sh "$@"; fi
extras=(test)
if [ "$mode" = --published ]; then extras+=(published); fi
bash jobs/local/setup.sh "${extras[@]}"
source jobs/local/environment.sh

# Several times what the tests may take, so that only a hang meets the limit and not a busy machine.
# An interrupt rather than a kill, so that pytest still says which test it was in. --foreground: Ctrl-C reaches pytest.
limit=45m
tests() { timeout --foreground --signal=INT --kill-after=60 "$limit" python -m pytest --durations=20 "$@"; }

# Files of the tests lie in memory where there is enough: on a disk they wait for each fsync, a thousand times.
if [ -w /dev/shm ] && [ "$(df --output=avail --block-size=1G /dev/shm | tail -1)" -ge 6 ]; then
    TMPDIR=$(mktemp -d /dev/shm/noria-tests.XXXXXX)
    chmod 755 "$TMPDIR" # as /tmp is: a helper of the run is another user
    export TMPDIR
    trap 'rm -rf "$TMPDIR"' EXIT
fi

which=""
case $mode in
    --quick) limit=10m which="not slow and " ;;
    --full) limit=4h; export NORIA_TEST_FULL=1 ;;
    --published) limit=20m; tests tests/published "$@"; exit ;;
esac
cores=$(nproc)
workers=${NORIA_TEST_WORKERS:-$((cores < 8 ? cores : 8))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # threads of several workers on one core would wait for each other

# What measures time has the machine to itself. pytest's 5: no test was asked for in that half.
together=0 alone=0
tests --numprocesses "$workers" --dist loadscope --no-loadscope-reorder -m "${which}not alone" "$@" || together=$?
[ "$together" -le 1 ] || [ "$together" -eq 5 ] || exit "$together"
tests -m "${which}alone" "$@" || alone=$?
if [ "$together" -eq 5 ]; then exit "$alone"; fi
if [ "$alone" -eq 5 ]; then exit "$together"; fi
exit $((together > alone ? together : alone))
