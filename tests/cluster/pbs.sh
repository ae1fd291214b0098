# shellcheck shell=bash
# shellcheck disable=SC2154 # scratch, workplace, here, few, many and part_seconds are tests/cluster.sh's
# The PBS scripts under pbs_stand_in.py, which sets what OpenPBS was seen to set and refuses what it refuses.

pbs_up() {
    mkdir -p "$scratch/pbs" "$scratch/bin"
    for name in qsub qstat qrerun; do
        printf '#!/bin/sh\nexec "%s" "%s" "%s" "$@"\n' "$(command -v python)" "$here/cluster/pbs_stand_in.py" "$name" > "$scratch/bin/$name"
        chmod +x "$scratch/bin/$name"
    done
}

pbs_ended() { [ -e "$scratch/pbs/${1%.stand-in}/exit" ]; }

# pbs_finish JOB SECONDS LOG
pbs_finish() {
    wait_for "$2" pbs_ended "$1" || { cat "$3"; return 1; }
    cat "$3"
    [ "$(cat "$scratch/pbs/${1%.stand-in}/exit")" -eq 0 ]
}

pbs_single() {
    job=$(qsub -l select=1:ncpus=2:mpiprocs=2 -v RUN="${few[*]} --output outputs/pbs.h5" jobs/pbs/single_node.pbs)
    pbs_finish "$job" 90 "noria.o${job%.stand-in}"
    same_rows outputs/alone.h5 outputs/pbs.h5
}

# qsub takes the sizes that `noria plan` prints.
pbs_planned() {
    local sizes
    read -ra sizes <<< "$(noria plan --ranks 2 "${few[@]}" --output outputs/pbs-planned.h5 | sed -n 's/^#PBS //p' | tr '\n' ' ')"
    [ "${#sizes[@]}" -eq 4 ]
    job=$(qsub "${sizes[@]}" -v RUN="${few[*]} --output outputs/pbs-planned.h5" jobs/pbs/single_node.pbs)
    pbs_finish "$job" 90 "noria.o${job%.stand-in}"
    same_rows outputs/alone.h5 outputs/pbs-planned.h5
}

pbs_nodes() {
    job=$(qsub -l select=2:ncpus=1:mpiprocs=1 -v RUN="${few[*]} --output outputs/pbs-nodes.h5" jobs/pbs/several_nodes.pbs)
    pbs_finish "$job" 90 "noria.o${job%.stand-in}"
    same_rows outputs/alone.h5 outputs/pbs-nodes.h5
}

# As mpirun of Open MPI 5 does when it has lost a node.
pbs_lost() {
    job=$(qsub -l select=2:ncpus=1:mpiprocs=1 -v NORIA_LAUNCH=true,RUN="${few[*]} --output outputs/lost.h5" jobs/pbs/several_nodes.pbs)
    wait_for 60 pbs_ended "$job"
    says "noria.o${job%.stand-in}" "the output is not finished"
    [ "$(cat "$scratch/pbs/${job%.stand-in}/exit")" -eq 1 ]
}

pbs_array() {
    noria merge --help >/dev/null 2>&1 || skip "noria merge is not there yet"
    job=$(qsub -J 1-2 -l select=1:ncpus=1:mpiprocs=1 -v SHARDS=2,OUTPUT=outputs/pbs-array.h5,RUN="${few[*]}" jobs/pbs/array.pbs)
    for i in 1 2; do pbs_finish "${job%"[].stand-in"}[$i]" 90 "noria.o${job%"[].stand-in"}.$i"; done
    job=$(qsub -v SHARDS=2,OUTPUT=outputs/pbs-array.h5 jobs/pbs/merge.pbs)
    pbs_finish "$job" 30 "noria-merge.o${job%.stand-in}"
    same_rows outputs/alone.h5 outputs/pbs-array.h5
}

# PBS sends nothing before the end: Noria asks qstat, stops in time, and the script has it run again. If the run is whole within
# that walltime, the machine is faster than when the run was measured, and it is tried again with half of it.
pbs_rerun() {
    local try seconds=$part_seconds starts=1
    for try in 1 2 3; do
        job=$(qsub -l select=1:ncpus=2:mpiprocs=2 -l walltime="00:00:$seconds" -v RUN="${many[*]} --output outputs/rerun-$try.h5" \
            jobs/pbs/single_node.pbs)
        pbs_finish "$job" 600 "noria.o${job%.stand-in}"
        starts=$(cat "$scratch/pbs/${job%.stand-in}/run_count")
        echo "walltime $seconds s, started $starts times"
        same_rows outputs/all.h5 "outputs/rerun-$try.h5"
        [ "$starts" -eq 1 ] || return 0
        seconds=$(((seconds + 1) / 2))
    done
    return 1
}

pbs_refuses() {
    expect 1 qsub -l select=1:ncpus=2:gpus=2 -v RUN=x jobs/pbs/single_node.pbs 2> outputs/refused
    says outputs/refused "Unknown resource: gpus"
    expect 1 qsub -l wall_time=00:10:00 -v RUN=x jobs/pbs/single_node.pbs 2> outputs/refused
    says outputs/refused "Unknown resource: wall_time"
}
