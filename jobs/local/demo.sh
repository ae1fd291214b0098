#!/usr/bin/env bash
# The main job end to end on this machine: sets up .venv, converts a model, generates on two ranks, shows what it says.
#   bash jobs/local/demo.sh [--chat] [--overwrite] [--max-new-tokens 64 ...]     words after it go to noria run
#     --chat   a published chat model answers inputs/demo/questions.jsonl: 93 MB to fetch, 1.2 GB on disk
set -euo pipefail

cd "$(dirname "$0")/../.."
chat=''
if [ "${1:-}" = --chat ]; then chat=$1; shift; fi
bash jobs/local/setup.sh ${chat:+published}
source jobs/local/environment.sh
# Two ranks share these cores: more threads than one a rank only get in each other's way with a model this small.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

name=run
model=inputs/demo/model
checkpoint=outputs/demo/model.h5
if [ "$chat" ]; then name=chat model=outputs/demo/chat checkpoint=outputs/demo/chat-model.h5; fi
output=outputs/demo/$name.h5
text=outputs/demo/$name.jsonl
mkdir -p outputs/demo

step() { printf '\n$ %s\n' "$*"; "$@"; }

if [ "$chat" ]; then step python jobs/local/published_model.py "$model"; fi
# A checkpoint is converted once, and again when the model's files are newer.
if [ ! -e "$checkpoint" ] || [ -n "$(find "$model" -newer "$checkpoint")" ]; then
    rm -f "$checkpoint"
    step noria convert "$model" "$checkpoint"
fi

before=$(stat -c %Y.%i "$output" 2>/dev/null || true)
step mpirun -n 2 noria run "inputs/demo/$name.toml" "$@"
rm -f "$text"
step noria export "$output" "$text"

python - "$text" "$chat" <<'PYTHON'
import json, sys, textwrap

def indented(text, width):
    lines = (line for part in text.strip().splitlines() for line in textwrap.wrap(part, 112 - width) or [""])
    return "\n".join(" " * width + line for line in lines)

rows = [json.loads(line) for line in open(sys.argv[1], encoding="utf-8")]
if sys.argv[2]:
    for row in rows:
        print()
        for message in json.loads(row["prompt"]):
            print(indented(f"{message['role']}: {message['content']}", 2))
        print(indented(row["text"] + (" [...]" if row["finish_reason"] == "length" else ""), 8))
else:
    print("\nThe first three generations:")
    for row in rows[:3]:
        print(f"  {row['id']}: {row['prompt']!r} -> {row['text']!r}")
PYTHON
printf '\nAll of them: %s (HDF5) and %s (JSON lines)\n' "$output" "$text"
if [ -n "$before" ] && [ "$before" = "$(stat -c %Y.%i "$output")" ]; then
    echo "They were there from an earlier call, so nothing was generated now. Anew: bash jobs/local/demo.sh ${chat:+$chat }--overwrite"
fi
echo "To go on in this shell: source jobs/local/environment.sh   (puts noria and mpirun on PATH, also as root and for more ranks than cores)"
