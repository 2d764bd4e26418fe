#!/usr/bin/env bash
# bash launch/slurm/in_environment.sh COMMAND...
# Becomes the command, in the packages that PROTOCLIP_ENVIRONMENT names: venv:FOLDER, conda:NAME, apptainer:IMAGE, or those there are.
set -euo pipefail
source launch/slurm/environment.sh

environment=${PROTOCLIP_ENVIRONMENT:-}
name=${environment#*:}
[ -z "$environment" ] || export PYTHONNOUSERSITE=1 # packages in ~/.local would stand before those of an image or of conda
case $environment in
    "") ;;
    venv:*)
        [ -x "$name/bin/python" ] || fail "PROTOCLIP_ENVIRONMENT $environment: $HOSTNAME has no $name/bin/python"
        export VIRTUAL_ENV=$name PATH=$name/bin:$PATH
        ;;
    conda:*)
        command -v "${CONDA_EXE:-conda}" >/dev/null || fail "PROTOCLIP_ENVIRONMENT $environment: $HOSTNAME has no conda on its PATH"
        set +u # its scripts read variables that are not set
        eval "$("${CONDA_EXE:-conda}" shell.bash hook)"
        conda activate "$name" || fail "PROTOCLIP_ENVIRONMENT $environment: conda on $HOSTNAME cannot activate it"
        set -u
        ;;
    apptainer:*)
        [ -e "$name" ] || fail "PROTOCLIP_ENVIRONMENT $environment: $HOSTNAME sees no such image"
        # The code is this checkout's. Apptainer shows the home folder by itself, and what APPTAINER_BIND names.
        folders=(--bind "$PWD")
        for folder in "${PROTOCLIP_SCRATCH:-}" "${HF_HOME:-}"; do
            if [ -n "$folder" ]; then
                mkdir -p "$folder" # what is not there cannot be bound
                folders+=(--bind "$folder")
            fi
        done
        set -- apptainer exec ${SLURM_GPUS_ON_NODE:+--nv} "${folders[@]}" --pwd "$PWD" "$name" "$@" # --nv: with the node's driver
        ;;
    *) fail "PROTOCLIP_ENVIRONMENT $environment: write venv:FOLDER, conda:NAME or apptainer:IMAGE" ;;
esac
exec "$@"
