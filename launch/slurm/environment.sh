# shellcheck shell=bash
# Sourced by the scripts of this folder, on every node: what is particular to the cluster.

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

[ -f launch/slurm/node.sh ] || fail "$PWD is no checkout of protoclip-scale: submit from its top folder, or with --chdir"

cluster_env=${PROTOCLIP_CLUSTER_ENV:-launch/slurm/cluster.env}
if [ -e "$cluster_env" ]; then
    set +u -a # what it sets is exported; `module load` reads variables that are not set
    # shellcheck source=launch/slurm/cluster.env.example
    source "$cluster_env"
    set -u +a
elif [ -n "${PROTOCLIP_CLUSTER_ENV:-}" ]; then
    fail "PROTOCLIP_CLUSTER_ENV $cluster_env: there is no such file"
fi
