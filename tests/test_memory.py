"""What a process may still fill, over trees of control groups as the kernel shows them, made in a folder."""

from pathlib import Path

import pytest

from noria.launch import memory

MIB = 1 << 20
V1, V2 = "sys/fs/cgroup/memory", "sys/fs/cgroup"
MOUNT_1 = "35 31 0:32 {top} /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory\n"
MOUNT_2 = "41 31 0:38 {top} /{at} rw,relatime - cgroup2 cgroup2 rw,nsdelegate\n"


def tree(root, cgroup, mountinfo, groups):
    """The files of /proc and of each group: its folder, and in MiB its limits, what it uses and what of that is files."""
    files = {
        "proc/meminfo": f"MemTotal: {100 << 20} kB\nMemFree: 1 kB\nMemAvailable:   {64 << 20} kB\n",
        "proc/self/cgroup": cgroup,
        "proc/self/mountinfo": "23 1 254:0 / / rw,relatime - ext4 /dev/root rw\n" + mountinfo,
    }
    for folder, (limits, used, inactive, active) in groups.items():
        before = "total_" if "memory.limit_in_bytes" in limits else ""
        own = (
            f"inactive_file {9 << 50}\nactive_file {9 << 50}\n" if before else ""
        )  # of version 1: without groups below
        files |= {
            f"{folder}/{name}": str(value * MIB if isinstance(value, int) else value) for name, value in limits.items()
        }
        files[f"{folder}/{'memory.usage_in_bytes' if before else 'memory.current'}"] = str(used * MIB)
        stat = f"{own}{before}inactive_file {inactive * MIB}\n{before}active_file {active * MIB}\nshmem {9 << 50}\n"
        files[f"{folder}/memory.stat"] = stat
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def v1(limit, used, inactive=0, active=0, hierarchy=None):
    more = {} if hierarchy is None else {"memory.use_hierarchy": str(hierarchy)}
    return {"memory.limit_in_bytes": limit, **more}, used, inactive, active


def v2(limit, used, inactive=0, active=0, high="max"):
    return {"memory.max": limit, "memory.high": high}, used, inactive, active


NONE_1 = "9223372036854771712"  # what version 1 says where there is no limit
STEP = "/slurm/uid_0/job_1/step_0/task_0"
SLURM_1 = {
    V1: v1(NONE_1, 40000),
    f"{V1}/slurm": v1(NONE_1, 30000),
    f"{V1}/slurm/uid_0": v1(NONE_1, 30000),
    f"{V1}/slurm/uid_0/job_1": v1(600, 100),
    f"{V1}/slurm/uid_0/job_1/step_0": v1(600, 100),
    f"{V1}{STEP}": v1(NONE_1, 90),
}
SCOPE = "/system.slice/slurmstepd.scope/job_7/step_0/user/task_0"
AT_2 = MOUNT_2.format(top="/", at=V2)
CASES = {
    "no groups at all": ("", "", {}, 64 << 10),
    "version 2, no limit": ("0::/a\n", AT_2, {f"{V2}/a": v2("max", 5000)}, 64 << 10),
    "version 2, a limit": ("0::/a\n", AT_2, {f"{V2}/a": v2(1000, 300)}, 700),
    # what 1.4 GiB that were written leave behind in a job of 1.5 GiB
    "version 2, full of pages of files": ("0::/a\n", AT_2, {f"{V2}/a": v2(1536, 1536, 1000, 434)}, 1434),
    "version 2, more pages of files than use": ("0::/a\n", AT_2, {f"{V2}/a": v2(1000, 300, 200, 200)}, 1000),
    "version 2, over its limit": ("0::/a\n", AT_2, {f"{V2}/a": v2(1000, 1200, 50, 50)}, 0),
    "version 2, held up before its limit": ("0::/a\n", AT_2, {f"{V2}/a": v2(1000, 300, high=800)}, 500),
    "version 2, the job's limit above the task's group": (
        f"0::{SCOPE}\n",
        AT_2,
        {f"{V2}{SCOPE}": v2("max", 10), f"{V2}/system.slice/slurmstepd.scope/job_7": v2(600, 100)},
        500,
    ),
    "version 2, a container that sees its group as the top": ("0::/\n", AT_2, {V2: v2(2000, 500)}, 1500),
    "version 1, a limit": ("4:memory:/a\n", MOUNT_1.format(top="/"), {f"{V1}/a": v1(1000, 300)}, 700),
    "version 1, several controllers in one": (
        "4:cpuset,memory:/a\n",
        MOUNT_1.format(top="/"),
        {f"{V1}/a": v1(1000, 300)},
        700,
    ),
    "version 1, full of pages of files": (
        "4:memory:/a\n",
        MOUNT_1.format(top="/"),
        {f"{V1}/a": v1(1536, 1536, 1000, 434)},
        1434,
    ),
    "version 1, SLURM's job above step and task": (f"4:memory:{STEP}\n", MOUNT_1.format(top="/"), SLURM_1, 500),
    "version 1, a limit that does not hold below": (
        "4:memory:/a/b\n",
        MOUNT_1.format(top="/"),
        {f"{V1}/a": v1(600, 100, hierarchy=0), f"{V1}/a/b": v1(2000, 100, hierarchy=1)},
        1900,
    ),
    "version 1, the group's own limit, which does not hold below": (
        "4:memory:/a/b\n",
        MOUNT_1.format(top="/"),
        {f"{V1}/a": v1(2000, 100, hierarchy=0), f"{V1}/a/b": v1(600, 100, hierarchy=0)},
        500,
    ),
    "version 1, a container's path from the host's top": (
        "4:memory:/docker/0a1b/job\n",
        MOUNT_1.format(top="/docker/0a1b"),
        {V1: v1(4000, 1000), f"{V1}/job": v1(900, 100)},
        800,
    ),
    "both versions, memory in version 1": (
        f"4:memory:{STEP}\n0::/\n",
        MOUNT_1.format(top="/") + MOUNT_2.format(top="/", at="sys/fs/cgroup/unified"),
        SLURM_1,
        500,
    ),
    "no memory controller": ("4:cpu:/a\n", "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n", {}, 64 << 10),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_free_is_what_the_tightest_group_above_leaves_with_its_pages_of_files(case, tmp_path):
    *files, free = CASES[case]
    assert memory.free_nbytes(tree(tmp_path, *files)) == free * MIB


def test_this_machine_says_how_much_memory_is_free():
    total = next(int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line)
    assert 0 < memory.free_nbytes() <= total * 1024


def test_the_most_that_a_process_has_had_is_told_by_kernels_that_do_not_write_it_into_its_status_too(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    status = tmp_path / "proc/self/status"
    status.write_text("VmSize:\t 900 kB\nVmHWM:\t  300 kB\nVmRSS:\t  200 kB\n")
    assert memory.peak_nbytes(tmp_path) == 300 * 1024
    status.write_text("VmSize:\t900 kB\nVmRSS:\t200 kB\n")  # as gVisor has it
    assert memory.peak_nbytes(tmp_path) > 0.9 * memory.peak_nbytes(), "here both say it"


def test_a_mount_whose_name_is_no_text_is_a_mount_like_another(tmp_path):
    *files, free = CASES["both versions, memory in version 1"]
    tree(tmp_path, *files)
    mounts = tmp_path / "proc/self/mountinfo"
    mounts.write_bytes(b"60 23 0:50 / /media/m\xfcll rw shared:1 - cifs //host/m\xfcll rw\n" + mounts.read_bytes())
    assert memory.free_nbytes(tmp_path) == free * MIB
