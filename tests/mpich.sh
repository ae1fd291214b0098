#!/usr/bin/env bash
# The tests of ranks under MPICH instead of Open MPI: the wheels of both stand beside each other, in an environment that is
# made for this and thrown away. Needs .venv (bash tests/run.sh) and PyPI.
#   bash tests/mpich.sh [pytest arguments]
set -euo pipefail

cd "$(dirname "$0")/.."
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT

.venv/bin/python -m venv "$room"
"$room/bin/pip" install --quiet --disable-pip-version-check mpich mpi4py
# What else Noria needs comes from .venv; mpi4py, found first, takes the MPI library that lies beside it.
packages=$("$room/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$packages/noria_venv.pth"
printf '#!%s\nimport sys\nfrom noria.__main__ import main\nsys.exit(main())\n' "$room/bin/python" > "$room/bin/noria"
chmod +x "$room/bin/noria"
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"

"$room/bin/mpirun" -n 2 "$room/bin/python" -c 'from mpi4py import MPI; assert "MPICH" in MPI.Get_library_version(), "not MPICH"'
[ $# -gt 0 ] || set -- tests/test_run_{stops,failures,refusals}.py tests/test_same.py tests/test_ring.py -m mpi
"$room/bin/python" -m pytest "$@"
