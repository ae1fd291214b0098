#!/usr/bin/env bash
# Tests that need root or daemons (a SLURM of one node, a PBS), which is why tests/run.sh leaves them out.
#   bash tests/cluster.sh
set -euo pipefail

for name in "SLURM job scripts" "PBS job scripts"; do
    echo "cluster: skipped: $name: no test of them yet"
done
echo "cluster: nothing was tested"
