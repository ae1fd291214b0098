# shellcheck shell=bash
# shellcheck disable=SC2154 # scratch, workplace, here, few, many and part_seconds are tests/cluster.sh's
# A real SLURM on loopback, without systemd or cgroups: one controller and two nodes that are both this machine.

slurm_packages=(slurm-wlm munge libpmix2)

slurm_up() {
    apt_install "${slurm_packages[@]}" || skip "apt cannot install ${slurm_packages[*]}"
    local dir=$scratch/slurm host ports pmix
    host=$(hostname -s)
    read -ra ports <<< "$(free_ports 3)"
    mkdir -p "$dir"/{run,log,state}
    mkdir -p "$dir/tmp-$host" "$dir/tmp-second"  # the PMIx of a node leaves its sockets there
    chmod 755 "$scratch" "$dir"
    # Debian's SLURM asks for a name that only the development package of libpmix has.
    for pmix in /usr/lib/*/pmix2/lib; do
        if [ ! -e "$pmix/libpmix.so" ]; then ln -s libpmix.so.2 "$pmix/libpmix.so"; fi
    done
    # The first node bears the machine's own name: MPI compares it with the name that SLURM gives.
    cat > "$dir/slurm.conf" <<CONF
ClusterName=noria
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/run/munge.sock
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_min_interval=0,batch_sched_delay=0
SlurmdParameters=config_overrides
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool-%n
TmpFS=$dir/tmp-%n
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/%n.log
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/%n.pid
ReturnToService=2
KillWait=5
MailProg=/bin/true
NodeName=$host NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[1]} CPUs=2 CoresPerSocket=2 RealMemory=64000
NodeName=second NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[2]} CPUs=2 CoresPerSocket=2 RealMemory=64000
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
    dd if=/dev/urandom of="$dir/run/munge.key" bs=1024 count=1 status=none
    chmod 600 "$dir/run/munge.key"
    chown -R munge: "$dir/run"
    runuser -u munge -- munged --key-file="$dir/run/munge.key" --socket="$dir/run/munge.sock" \
        --pid-file="$dir/run/munged.pid" --log-file="$dir/run/munged.log" --seed-file="$dir/run/munged.seed"
    slurmctld -f "$SLURM_CONF"
    slurmd -f "$SLURM_CONF" -N "$host"
    slurmd -f "$SLURM_CONF" -N second
    wait_for 20 slurm_idle
}

slurm_idle() { [ "$(sinfo -h -N -o %t 2>/dev/null | grep -c '^idle$')" -eq 2 ]; }

slurm_down() {
    local file pid
    if [ ! -d "$scratch/slurm/run" ]; then return; fi
    timeout 10 scancel --user=root 2>/dev/null || true
    for file in "$scratch"/slurm/run/*.pid; do
        if [ -e "$file" ]; then pid=$(cat "$file"); kill "$pid" 2>/dev/null || true; fi
    done
}

# submit OUT SCRIPT ...: with the sizes of this machine; prints the job's id.
submit() {
    sbatch --parsable --ntasks-per-node=2 --cpus-per-task=1 --gres=none --time=10 "$@"
}

slurm_ended() {
    local states
    states=$(scontrol show job "$1" | grep -o 'JobState=[A-Z]*') || return 1
    ! grep -qE 'PENDING|RUNNING|COMPLETING|CONFIGURING|REQUEUED|SUSPENDED' <<< "$states"
}

# job_code JOB: the exit code of a job that has ended, or 0 for one that SLURM has forgotten.
job_code() { scontrol show job "$1" | sed -n 's/.*ExitCode=\([0-9]*\):.*/\1/p' | sort -n | tail -n 1; }

# finish JOB SECONDS: waits for its end and fails with its log unless it ended well.
finish() {
    wait_for "$2" slurm_ended "$1" || { cat outputs/*-"$1"*.out; scontrol show job "$1"; return 1; }
    cat outputs/*-"$1"*.out
    [ "$(job_code "$1")" -eq 0 ] || { scontrol show job "$1"; tail -n 15 "$scratch"/slurm/log/*; return 1; }
}

slurm_mpirun() {
    job=$(NORIA_LAUNCH="mpirun --bind-to none" submit jobs/slurm/single_node.sbatch "${few[@]}" --output outputs/mpirun.h5)
    finish "$job" 90
    same_rows outputs/alone.h5 outputs/mpirun.h5
}

slurm_srun() {
    job=$(NORIA_LAUNCH="srun --mpi=pmix" submit --nodelist="$(hostname -s)" jobs/slurm/single_node.sbatch "${few[@]}" \
        --output outputs/srun.h5)
    finish "$job" 90
    same_rows outputs/alone.h5 outputs/srun.h5
}

# The defaults of the script itself: bound to cores.
slurm_nodes() {
    job=$(OMPI_MCA_btl=self,sm,tcp submit --ntasks-per-node=1 jobs/slurm/several_nodes.sbatch "${few[@]}" --output outputs/nodes.h5)
    finish "$job" 90
    says "outputs/noria-$job.out" "rank=0/2"
    same_rows outputs/alone.h5 outputs/nodes.h5
}

slurm_srun_nodes() {
    job=$(NORIA_LAUNCH="srun --mpi=pmix" OMPI_MCA_btl=self,sm,tcp submit --ntasks-per-node=1 jobs/slurm/several_nodes.sbatch \
        "${few[@]}" --output outputs/srun-nodes.h5)
    finish "$job" 90
    says "outputs/noria-$job.out" "rank=0/2"
    same_rows outputs/alone.h5 outputs/srun-nodes.h5
}

# sbatch takes the sizes that `noria plan` prints; this machine has fewer cores.
slurm_planned() {
    local sizes
    mapfile -t sizes < <(noria plan --ranks 2 "${few[@]}" --output outputs/planned.h5 | sed -n 's/^#SBATCH //p')
    [ "${#sizes[@]}" -ge 5 ]
    job=$(NORIA_LAUNCH="mpirun --bind-to none" sbatch --parsable --gres=none "${sizes[@]}" --cpus-per-task=1 \
        jobs/slurm/single_node.sbatch "${few[@]}" --output outputs/planned.h5)
    finish "$job" 90
    says "outputs/noria-$job.out" "rank=0/2"
    same_rows outputs/alone.h5 outputs/planned.h5
}

slurm_array() {
    noria merge --help >/dev/null 2>&1 || skip "noria merge is not there yet"
    job=$(NORIA_LAUNCH="mpirun --bind-to none" submit --ntasks-per-node=1 --array=1-2 jobs/slurm/array.sbatch outputs/array.h5 "${few[@]}")
    merge=$(sbatch --parsable --dependency=afterok:"$job" jobs/slurm/merge.sbatch outputs/array.h5 2)
    finish "$job" 90
    finish "$merge" 30
    same_rows outputs/alone.h5 outputs/array.h5
}

# The last task of an array has the array's own id: what stops it must queue up that task alone. A stop file stops it.
slurm_array_task() {
    local shard=outputs/tasks.shard-2-of-2.h5
    job=$(NORIA_LAUNCH="mpirun --bind-to none" submit --ntasks-per-node=1 --array=1-2 jobs/slurm/array.sbatch outputs/tasks.h5 "${many[@]}")
    wait_for 60 some_parts "$shard"
    touch "$shard.stop"
    wait_for 60 slurm_task_restarts "$job" 2 1
    slurm_task_restarts "$job" 1 0
    [ ! -e "$shard.stop" ]
    says "outputs/noria-${job}_2.out" "stopping (tasks.shard-2-of-2.h5.stop was made): "
    scancel "$job"
    wait_for 60 slurm_idle
}

# slurm_task_restarts JOB TASK COUNT: how often this task of an array was queued up again.
slurm_task_restarts() {
    local task
    task=$(scontrol -o show job "$1" | grep "ArrayTaskId=$2 ") && grep -q "Restarts=$3 " <<< "$task"
}

# The shell of `srun --pty` on a terminal: the variables of a step of four tasks, and one process. On the node that bears the
# machine's name: on another mpirun would start its daemon there by srun, which waits for the cores that the shell has.
slurm_shell() {
    cat > shell.sh <<'SHELL'
[ -t 0 ] || exit 0  # the other tasks of the step have no terminal
exec > shell.log 2>&1
set -x
noria inspect outputs/demo/model.h5 && noria validate "$@" && noria plan --ranks 2 "$@" || exit 11
noria run "$@"; [ $? -eq 2 ] || exit 12
mpirun -n 1 noria run "$@" || exit 13
noria export outputs/shell.h5 outputs/shell.jsonl || exit 14
SLURM_JOB_END_TIME=1000000000 SLURM_JOB_ID=4294967 mpirun -n 1 noria run "$@" --overwrite; [ $? -eq 2 ] || exit 15
SHELL
    local spawn='import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))'
    timeout 120 python -c "$spawn" srun --nodelist="$(hostname -s)" --ntasks=4 --nodes=1 --overcommit --time=10 --pty bash shell.sh "${few[@]}" --output outputs/shell.h5 </dev/null \
        || { cat shell.log; return 1; }
    says shell.log "a step of 4 tasks gave this shell its terminal, but no ranks are started: in the shell of srun --pty"
    says shell.log "SLURM_JOB_END_TIME says that job 4294967 was over at 2001-09-09T01:46:40Z"
    [ "$(wc -l < outputs/shell.jsonl)" -eq 8 ]
    same_rows outputs/alone.h5 outputs/shell.h5
}

# A lonely rank would generate everything once per rank and say that all is well.
slurm_lonely() {
    job=$(NORIA_LAUNCH="srun --mpi=pmi2" submit jobs/slurm/single_node.sbatch "${few[@]}" --output outputs/lonely.h5)
    wait_for 60 slurm_ended "$job"
    cat "outputs/noria-$job.out"
    [ "$(job_code "$job")" -eq 2 ]
    [ ! -e outputs/lonely.h5 ]
}

# SLURM's notice comes up to a minute before the time that was asked for, so this one is sent by hand, as scancel does.
slurm_requeue() {
    noria run --help | grep -q -- --walltime || skip "noria run has no --walltime yet"
    job=$(NORIA_LAUNCH="mpirun --bind-to none" submit jobs/slurm/single_node.sbatch "${many[@]}" --output outputs/requeue.h5)
    wait_for 60 some_parts outputs/requeue.h5
    scancel --batch --signal=USR1 "$job"
    wait_for 60 slurm_requeued "$job"
    # SLURM would hold it back for two minutes, until what the node knows of the first start has expired: it refuses a start
    # in the same second.
    sleep 2
    scontrol update "jobid=$job" StartTime=now
    scontrol release "$job"
    finish "$job" 120
    says "outputs/noria-$job.out" "start 2"
    same_rows outputs/all.h5 outputs/requeue.h5
}

some_parts() { compgen -G "$1.parts/part-*.h5" >/dev/null; }
slurm_requeued() { scontrol show job "$1" | grep -q 'JobState=PENDING.*' && scontrol show job "$1" | grep -q 'Restarts=1'; }
