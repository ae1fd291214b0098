"""What a job script asks a scheduler for, so that a plan's run fits: lines for SLURM and for PBS."""

import math

from noria.limits import HOST_NBYTES, MEMORY_SHARE
from noria.plan.plan import Plan

CORES = 8  # of a rank: loading and reading threads, and messages
RANKS_OF_A_NODE = 8
STARTING_SECONDS = 300
SHORTEST_SECONDS = 900  # of a walltime: a scheduler's notice and the start-up must fit in
SLACK = 1.5  # times the predicted time is asked for


def script_lines(plan: Plan, device: str) -> list[str]:
    """The lines for a plan on GPUs, or on a device "cpu"."""
    num_ranks, seconds = plan.num_ranks, STARTING_SECONDS + SLACK * plan.predicted["seconds"]
    nodes = math.ceil(num_ranks / RANKS_OF_A_NODE)
    per_node = math.ceil(num_ranks / nodes)
    full = num_ranks - nodes * (per_node - 1)  # nodes of so many ranks; the others have one less
    tiers = ("gpu", "cpu") if device == "cpu" else ("cpu",)
    host = max(sum(sum(table[tier].values()) for tier in tiers) for table in plan.memory)
    memory = math.ceil(per_node * (host / MEMORY_SHARE + HOST_NBYTES) / 1024**3)
    time = clock(math.ceil(seconds / SHORTEST_SECONDS) * SHORTEST_SECONDS)
    gpus = device != "cpu"
    return [
        f"#SBATCH --nodes={nodes}",
        *([f"#SBATCH --ntasks={num_ranks}"] * (full < nodes)),
        f"#SBATCH --ntasks-per-node={per_node}",
        *([f"#SBATCH --gres=gpu:{per_node}"] * gpus),
        f"#SBATCH --cpus-per-task={CORES}",
        f"#SBATCH --mem={memory}G",
        f"#SBATCH --time={time}",
        "#PBS -l select="
        + "+".join(
            f"{count}:ncpus={CORES * ranks}:mpiprocs={ranks}{f':ngpus={ranks}' * gpus}:mem={memory}gb"
            for count, ranks in ((full, per_node), (nodes - full, per_node - 1))
            if count
        ),
        f"#PBS -l walltime={time}",
    ]


def clock(seconds: float) -> str:
    """`HH:MM:SS`."""
    whole = max(round(seconds), 1)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"
