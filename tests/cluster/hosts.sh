# shellcheck shell=bash
# shellcheck disable=SC2154 # scratch, workplace, here, few, many and part_seconds are tests/cluster.sh's
# Two hosts on this machine: namespaces of their own for network, names and mounts, with one cable (a veth pair) between
# them. Each lives as long as the process that keeps it.

hosts_up() {
    command -v ip >/dev/null || apt_install iproute2 || skip "there is no ip command and apt cannot install iproute2"
    local host
    printf '127.0.0.1 localhost\n10.77.0.1 left\n10.77.0.2 right\n' > "$scratch/hosts"
    for host in left right; do
        # shellcheck disable=SC2016 # the inner shell expands its own arguments
        unshare --net --uts --mount bash -c 'hostname "$1"; mount --bind "$2" /etc/hosts; echo $$ > "$3"; exec sleep 900' \
            keeper "$host" "$scratch/hosts" "$scratch/$host.pid" &
    done
    wait_for 5 test -s "$scratch/left.pid" -a -s "$scratch/right.pid" || skip "no namespaces can be made here"
    ip link add cable netns "$(cat "$scratch/left.pid")" type veth peer name cable netns "$(cat "$scratch/right.pid")" ||
        skip "no veth pair can be made here"
    for host in left right; do
        on "$host" ip address add "$(awk -v host="$host" '$2 == host { print $1 }' "$scratch/hosts")/24" dev cable
        on "$host" ip link set lo up
        on "$host" ip link set cable up
    done
    # What mpirun takes for ssh: AGENT HOST COMMAND...
    cat > "$scratch/agent" <<AGENT
#!/usr/bin/env bash
host=\$1
shift
exec nsenter --target "\$(cat "$scratch/\$host.pid")" --net --uts --mount --wd="$workplace" bash -c "\$*"
AGENT
    chmod +x "$scratch/agent"
    wait_for 5 cable_works
}

# Nobody listens at port 9 of the other host, which is how it shows that it is there.
cable_works() { { on left timeout 2 bash -c 'exec 3<>/dev/tcp/right/9' 2>&1 || true; } | grep -q refused; }

on() { nsenter --target "$(cat "$scratch/$1.pid")" --net --uts --mount --wd="$PWD" "${@:2}"; }

# A rank on each host, from the left one, with the settings of several_nodes.sbatch that tell mpirun of a lost node.
hosts_mpirun() {
    eval "$(grep -h '^export PRTE_MCA_oob' jobs/slurm/several_nodes.sbatch)"
    on left timeout -k 5 "${1}" mpirun --host left:1,right:1 --bind-to none --prtemca plm_ssh_agent "$scratch/agent" \
        --mca pml ob1 --mca btl self,tcp --mca btl_tcp_if_include cable --prtemca prte_if_include cable \
        noria run "${@:2}"
}

hosts_ring() {
    hosts_mpirun 90 "${few[@]}" --transport mpi_host --output outputs/hosts.h5 2>&1 | tee outputs/hosts.log
    says outputs/hosts.log "rank 0: left"
    says outputs/hosts.log "rank 1: right"
    says outputs/hosts.log "transport mpi_host"
    same_rows outputs/alone.h5 outputs/hosts.h5
}

hosts_cut() {
    hosts_mpirun 120 "${many[@]}" --transport mpi_host --output outputs/cut.h5 > outputs/cut.log 2>&1 &
    local job=$! cut seconds code=0
    wait_for 60 some_parts outputs/cut.h5
    on right ip link set cable down
    cut=$SECONDS
    wait "$job" || code=$?
    seconds=$((SECONDS - cut))
    cat outputs/cut.log
    # Open MPI 5's code is 0 here, which is why several_nodes.sbatch asks for the output too.
    echo "the job ended with $code, $seconds s after the cut"
    [ "$seconds" -le 30 ]
    [ ! -e outputs/cut.h5 ]
    # Nothing of it is left on either host, and what was sealed is there.
    wait_for 40 no_ranks
    some_parts outputs/cut.h5
    on right ip link set cable up
    hosts_mpirun 90 "${many[@]}" --transport mpi_host --output outputs/cut.h5
    same_rows outputs/all.h5 outputs/cut.h5
}

no_ranks() { [ "$(pgrep -fc "noria run .*--output outputs/cut.h5")" -eq 0 ]; }
