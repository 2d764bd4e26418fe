#!/usr/bin/env bash
# srun ... bash launch/slurm/node.sh SCRIPT ARGUMENT...
# Runs once on every node of a job and starts the node's ranks of SCRIPT. What differs between nodes is looked up here:
# in the batch script SLURM_NODEID is 0, wherever it is passed on to.
set -euo pipefail
source launch/slurm/environment.sh

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
[ "${#nodes[@]}" -eq "$SLURM_NNODES" ] || fail "$HOSTNAME: scontrol names ${#nodes[@]} of $SLURM_NNODES nodes"
ranks_per_node=${PROTOCLIP_RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
ranks=$((SLURM_NNODES * ranks_per_node))
cpus=${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}
# Of this job alone, since nodes may be shared; below the ports that the kernel gives away.
port=$((15000 + SLURM_JOB_ID % 15000))
logs=${PROTOCLIP_LOGS:-logs}/$SLURM_JOB_ID/start-${SLURM_RESTART_COUNT:-0}/node-$SLURM_NODEID
mkdir -p "$logs"

export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} # compute nodes may reach no network; --check --fetch on a login node has cached what a recipe needs
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus > ranks_per_node ? cpus / ranks_per_node : 1))} # without it every rank would take all cores, or one
export PYTHONFAULTHANDLER=1 # a crash in compiled code leaves a traceback
export PYTHONUNBUFFERED=1   # what a rank said last is in its log
export NCCL_DEBUG=${NCCL_DEBUG:-WARN} # NCCL says why a connection failed; it says nothing by default
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600} # on TERM the launcher ends ranks that have not saved within 30 s; Slurm sets a limit of its own

ulimit -Sn "$(ulimit -Hn)" # loading processes pass tensors as open files, and 1,024 are few

# A signal of Slurm's reaches every process of the step. The ranks answer to it: they save and leave. The launcher would end at once on
# USR1 and leave them behind, so it ignores it (ranks install their own handler all the same); this shell must outlive the launcher.
trap "" USR1
trap : TERM

# static: machines keep Slurm's order (c10d numbers them as they come, and needs a head node that knows itself by the name it is called).
# max_restarts 0: after a failure Slurm starts all nodes anew; one launcher alone could not.
# standard: DeepSpeed's other ways to several machines need ssh, or start each machine as a world of its own.
# tee: what each rank prints goes to a file of its own under logs/, and to the job's log.
code=0
bash launch/slurm/in_environment.sh accelerate launch \
    --config_file "${PROTOCLIP_ACCELERATE:-launch/accelerate/ddp.yaml}" \
    --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" --num_processes "$ranks" \
    --main_process_ip "${nodes[0]}" --main_process_port "$port" --same_network --rdzv_backend static \
    --deepspeed_multinode_launcher standard --max_restarts 0 --tee 3 --log_dir "$logs" \
    "$@" --expect-ranks "$ranks" || code=$?

# The first node to fail ends the others (srun --kill-on-bad-exit): they have a moment to write what they know.
[ "$code" -eq 0 ] || sleep 5
exit "$code"
