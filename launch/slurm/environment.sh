# shellcheck shell=bash
# Sourced by the scripts of this folder, on every node: what is particular to the cluster.

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

cluster_env=${PROTOCLIP_CLUSTER_ENV:-launch/slurm/cluster.env}
if [ -e "$cluster_env" ]; then
    set +eu -a # what it sets is exported; `module load` reads variables that are not set, and a last condition that does not hold is no error
    # shellcheck source=launch/slurm/cluster.env.example
    source "$cluster_env"
    set -eu +a
elif [ -n "${PROTOCLIP_CLUSTER_ENV:-}" ]; then
    fail "PROTOCLIP_CLUSTER_ENV $cluster_env: there is no such file"
fi
