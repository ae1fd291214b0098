#!/usr/bin/env bash
# Tests that need root or daemons, which is why tests/run.sh leaves them out: the job scripts under a real SLURM of two nodes
# and a stand-in for PBS, and a ring over two hosts (namespaces of this machine). About 3 minutes on two idle cores.
#
#   bash tests/cluster.sh [WORD ...]     only the cases whose name has one of the words
#
# Everything is made in a folder under /tmp and ended at the end; only packages that apt installs stay.
set -uo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
root=$(dirname "$here")
# Several times what it takes, so that only a hang meets the limit and not a busy machine.
if [ -z "${NORIA_CLUSTER_LIMITED:-}" ]; then
    NORIA_CLUSTER_LIMITED=yes exec timeout --foreground --signal=TERM --kill-after=30 40m bash "$here/cluster.sh" "$@"
fi
# shellcheck source=cluster/common.sh
source "$here/cluster/common.sh"
# shellcheck source=cluster/slurm.sh
source "$here/cluster/slurm.sh"
# shellcheck source=cluster/pbs.sh
source "$here/cluster/pbs.sh"
# shellcheck source=cluster/hosts.sh
source "$here/cluster/hosts.sh"

scratch=$(mktemp -d /tmp/noria-cluster.XXXXXX)
export NORIA_CLUSTER_SCRATCH=$scratch
workplace=$scratch/work
export SLURM_CONF=$scratch/slurm/slurm.conf PBS_STAND_IN=$scratch/pbs OMP_NUM_THREADS=1
unset "${!SLURM_JOB@}" "${!SBATCH_@}" PBS_JOBID NORIA_LAUNCH NORIA_ENVIRONMENT NORIA_SHARDS NORIA_RESTARTS
# shellcheck source=../jobs/local/environment.sh
source "$root/jobs/local/environment.sh"
PATH=$scratch/bin:$PATH
PBS_STAND_IN_KEEP="NORIA_CLUSTER_SCRATCH PYTHONPATH ${!OMPI_@} ${!PRTE_@}"
export PBS_STAND_IN_KEEP

finish_all() {
    slurm_down
    end_processes
    rm -rf "$scratch"
}
trap finish_all EXIT
trap 'echo "cluster: failed: not finished in time, or interrupted"; exit 1' TERM INT

# The folder that jobs are submitted from: the repository's scripts and environment, outputs of its own.
set_up() {
    mkdir -p "$scratch/logs" "$workplace/outputs"
    [ -x "$root/.venv/bin/noria" ] || bash "$root/jobs/local/setup.sh" || return
    local name
    for name in jobs inputs .venv; do ln -s "$root/$name" "$workplace/$name"; done
    cd "$workplace" || return
    # Eight rows of the demo as they are, and a run of half a minute that is there to be interrupted.
    head -n 8 inputs/demo/prompts.jsonl > few.jsonl
    python - <<'PYTHON' || return
import itertools, json

texts = [json.loads(line)["prompt"] for line in open("inputs/demo/prompts.jsonl", encoding="utf-8")]
short = [text for text in texts if len(text) < 80]
with open("many.jsonl", "w", encoding="utf-8") as file:
    for row, text in enumerate(itertools.islice(itertools.cycle(short), 100)):
        file.write(json.dumps({"id": row, "prompt": text, "ignore_eos": True, "max_new_tokens": 40 + row % 17}) + "\n")
PYTHON
    local common=(inputs/demo/run.toml --device cpu --dtype float64 --seal-seconds 1)
    few=("${common[@]}" --max-new-tokens 16 --prompts few.jsonl)
    many=("${common[@]}" --prompts many.jsonl --temperature 0.7)
    noria convert inputs/demo/model outputs/demo/model.h5 || return
    SECONDS=0
    timeout 120 mpirun -n 1 noria run "${few[@]}" --output outputs/alone.h5 || return
    start_seconds=$SECONDS
    # Slowed down, so that there is time to interrupt it.
    many+=(--groups 1 --step-tokens 16)
    SECONDS=0
    timeout 180 mpirun -n 2 noria run "${many[@]}" --output outputs/all.h5 || return
    # A walltime in which the long run gets going and does not get done; one too short only makes it start once more.
    part_seconds=$((start_seconds + 1 + (SECONDS - start_seconds) * 2 / 5))
}
mkdir -p "$workplace/outputs/demo"
set_up > "$scratch/set_up.log" 2>&1 || { cat "$scratch/set_up.log"; echo "cluster: failed: setting up"; exit 1; }

# NAME FUNCTION [WHAT IT NEEDS]; a case whose room could not be opened is skipped with the reason.
plan=(
    "SLURM: one node, mpirun|slurm_mpirun|slurm_up"
    "SLURM: one node, srun --mpi=pmix|slurm_srun|slurm_up"
    "SLURM: several nodes, mpirun|slurm_nodes|slurm_up"
    "SLURM: several nodes, srun --mpi=pmix|slurm_srun_nodes|slurm_up"
    "SLURM: the sizes that noria plan prints|slurm_planned|slurm_up"
    "SLURM: an array of shards, merged|slurm_array|slurm_up"
    "SLURM: one task of an array, stopped by a file, is queued up again alone|slurm_array_task|slurm_up"
    "SLURM: the shell of srun --pty, and one that outlived its job|slurm_shell|slurm_up"
    "SLURM: lonely ranks are refused (srun --mpi=pmi2)|slurm_lonely|slurm_up"
    "SLURM: signal, 75, requeue, whole output|slurm_requeue|slurm_up"
    "PBS: one node|pbs_single|pbs_up"
    "PBS: the sizes that noria plan prints|pbs_planned|pbs_up"
    "PBS: several nodes|pbs_nodes|pbs_up"
    "PBS: an end with 0 but without output is none|pbs_lost|pbs_up"
    "PBS: an array of shards, merged|pbs_array|pbs_up"
    "PBS: walltime, 75, rerun, whole output|pbs_rerun|pbs_up"
    "PBS: unknown resources are refused|pbs_refuses|pbs_up"
    "two hosts: a ring over TCP|hosts_ring|hosts_up"
    "two hosts: the link is cut, the run resumed|hosts_cut|hosts_up"
    "job scripts: shellcheck|scripts_checked|"
)

scripts_checked() {
    apt_install shellcheck || skip "apt cannot install shellcheck"
    cd "$root"
    shellcheck jobs/*/*.sbatch jobs/*/*.pbs
    shellcheck -x -P SCRIPTDIR jobs/local/*.sh tests/*.sh tests/cluster/*.sh
}

# open_room FUNCTION: once; leaves in `closed` why its cases cannot run. As run_case, but silent where it works.
declare -A closed
open_room() {
    if [ -z "$1" ] || [ -n "${closed[$1]+opened}" ]; then return; fi
    local code=0
    closed[$1]=
    if [ "$1" != pbs_up ] && [ "$(id -u)" -ne 0 ]; then
        closed[$1]="needs root"
        return
    fi
    ( set -euo pipefail; "$1" ) > "$scratch/logs/$1.log" 2>&1 &
    wait $! || code=$?
    if [ $code -eq 77 ]; then
        closed[$1]=$(tail -n 1 "$scratch/logs/$1.log")
    elif [ $code -ne 0 ]; then
        closed[$1]="failed"
        cat "$scratch/logs/$1.log"
        num_failed=$((num_failed + 1))
        echo "cluster: failed: $1: exit code $code"
    fi
}

wanted() {
    local word
    [ $# -gt 1 ] || return 0
    for word in "${@:2}"; do case $1 in *"$word"*) return 0 ;; esac; done
    return 1
}

for line in "${plan[@]}"; do
    IFS='|' read -r name function room <<< "$line"
    wanted "$name" "$@" || continue
    open_room "$room"
    if [ -n "${closed[${room:-none}]:-}" ]; then
        skip_case "$name" "${closed[$room]}"
    else
        run_case "$name" "$function"
    fi
done
echo "$num_passed passed, $num_failed failed, $num_skipped skipped"
[ $num_failed -eq 0 ] && [ $((num_passed + num_skipped)) -gt 0 ]
