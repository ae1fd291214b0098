#!/usr/bin/env bash
# The main job end to end on this machine: sets up .venv, converts the demo model, generates on two ranks, shows some of it.
#   bash jobs/local/demo.sh [--overwrite] [--max-new-tokens 64 ...]     words after it go to noria run
set -euo pipefail

cd "$(dirname "$0")/../.."
bash jobs/local/setup.sh
source jobs/local/environment.sh
# Two ranks share these cores: more threads than one a rank only get in each other's way with a model this small.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

checkpoint=outputs/demo/model.h5
output=outputs/demo/run.h5
text=outputs/demo/run.jsonl
mkdir -p outputs/demo

step() { printf '\n$ %s\n' "$*"; "$@"; }

# A checkpoint is converted once, and again when the model's files are newer.
if [ ! -e "$checkpoint" ] || [ -n "$(find inputs/demo/model -newer "$checkpoint")" ]; then
    rm -f "$checkpoint"
    step noria convert inputs/demo/model "$checkpoint"
fi

before=$(stat -c %Y.%i "$output" 2>/dev/null || true)
step mpirun -n 2 noria run inputs/demo/run.toml "$@"
rm -f "$text"
step noria export "$output" "$text"

printf '\nThe first three generations:\n'
python - "$text" <<'PYTHON'
import itertools, json, sys
for line in itertools.islice(open(sys.argv[1], encoding="utf-8"), 3):
    row = json.loads(line)
    print(f"  {row['id']}: {row['prompt']!r} -> {row['text']!r}")
PYTHON
printf '\nAll of them: %s (HDF5) and %s (JSON lines)\n' "$output" "$text"
if [ -n "$before" ] && [ "$before" = "$(stat -c %Y.%i "$output")" ]; then
    echo "They were there from an earlier call, so nothing was generated now. Anew: bash jobs/local/demo.sh --overwrite"
fi
