# shellcheck shell=bash
# shellcheck disable=SC2154 # scratch, workplace, here, few, many and part_seconds are tests/cluster.sh's
# What the cases share: running one under a name, waiting for something, ending what was started. Sourced by tests/cluster.sh.

num_passed=0 num_failed=0 num_skipped=0

# case NAME FUNCTION: runs the function in a shell of its own that stops at the first error; its output is kept for a failure.
run_case() {
    local name=$1 log before=$SECONDS code tries
    log=$scratch/logs/$2.log
    for tries in 1 2 3; do
        code=0
        ( set -euo pipefail; cd "$workplace"; "$2" ) >"$log" 2>&1 &
        wait $! || code=$?
        # Seen of mpirun on a busy machine: it says nothing of the case.
        if [ $code -eq 0 ] || ! grep -qF "listener thread failed to start" "$log"; then break; fi
        echo "cluster: try $tries: $name: mpirun did not start"
    done
    if [ $code -eq 0 ]; then
        num_passed=$((num_passed + 1))
        echo "cluster: passed: $name ($((SECONDS - before)) s)"
    elif [ $code -eq 77 ]; then
        skip_case "$name" "$(tail -n 1 "$log")"
    else
        num_failed=$((num_failed + 1))
        echo "cluster: failed: $name: exit code $code after $((SECONDS - before)) s, the end of its output:"
        tail -n 60 "$log" | sed 's/^/    /'
    fi
}

skip_case() {
    num_skipped=$((num_skipped + 1))
    echo "cluster: skipped: $1: $2"
}

# Inside a case: the reason why it cannot run here.
skip() { echo "$1"; exit 77; }

# wait_for SECONDS COMMAND...: until the command succeeds.
wait_for() {
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        if [ $SECONDS -ge $end ]; then echo "waited in vain for: $*"; return 1; fi
        sleep 0.2
    done
}

# expect CODE COMMAND...: fails unless the command ends with this exit code.
expect() {
    local wanted=$1 code=0
    shift
    "$@" || code=$?
    [ $code -eq "$wanted" ] || { echo "exit code $code instead of $wanted: $*"; return 1; }
}

# says FILE TEXT: fails, showing the file, unless a line of it has the text.
says() { grep -qF -- "$2" "$1" || { echo "'$2' is not in $1:"; cat "$1"; return 1; }; }

# same_text A.h5 B.h5 [COUNT]: both hold the same rows with the same tokens, all done, COUNT of them.
same_rows() {
    noria inspect "$2" --verify >/dev/null
    python - "$@" <<'PYTHON'
import sys

import h5py

def rows(path):
    with h5py.File(path) as file:
        offsets, tokens = file["offsets"][:], file["tokens"][:]
        status = h5py.check_enum_dtype(file["status"].dtype)
        done = [code == status["done"] for code in file["status"][:]]
        assert all(done), f"{path}: {len(done) - sum(done)} rows are not done"
        return {id: tokens[a:b].tolist() for id, a, b in zip(file["id"].asstr()[:], offsets[:-1], offsets[1:], strict=True)}

one, other = rows(sys.argv[1]), rows(sys.argv[2])
assert one.keys() == other.keys(), f"rows of one alone: {sorted(one.keys() ^ other.keys())}"
differ = [id for id in one if one[id] != other[id]]
assert not differ, f"rows {differ} have other tokens in {sys.argv[2]}"
print(f"{len(other)} rows are the same")
PYTHON
}

# Every process that was started under this test carries its folder in its environment; the test's own shells do not.
processes() {
    local environment pid
    for environment in /proc/[0-9]*/environ; do
        pid=${environment//[!0-9]/}
        if [ "$pid" != $$ ] && grep -qz "^NORIA_CLUSTER_SCRATCH=$scratch\$" "$environment" 2>/dev/null; then echo "$pid"; fi
    done
}

end_processes() {
    local pid signal
    for signal in TERM KILL; do
        for pid in $(processes); do kill -"$signal" "$pid" 2>/dev/null || true; done
        for _ in $(seq 20); do [ -n "$(processes)" ] || return 0; sleep 0.1; done
    done
}

free_ports() {
    python - "$1" <<'PYTHON'
import socket, sys
sockets = [socket.socket() for _ in range(int(sys.argv[1]))]
for one in sockets:
    one.bind(("127.0.0.1", 0))
print(*(one.getsockname()[1] for one in sockets))
PYTHON
}

# apt_install PACKAGE...: true if they are there, or were installed now. No daemon of theirs is started.
apt_install() {
    if dpkg-query -W "$@" >/dev/null 2>&1; then return 0; fi
    local install=(timeout 180 apt-get -o DPkg::Lock::Timeout=60 install -y --no-install-recommends "$@")
    export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
    "${install[@]}" || { timeout 60 apt-get update && "${install[@]}"; }
}
