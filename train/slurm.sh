#!/bin/bash
# Several machines under SLURM: one launcher a machine, FSDP2 over all their GPUs.
#   sbatch train/slurm.sh --config NAME data=DIR out=RUN mixed_precision=bf16
# Two minutes before the time limit SLURM sends SIGTERM: the run saves a checkpoint and ends with 0, and the job puts
# itself back into the queue; resume_from_checkpoint=latest, the default, then goes on. Not run on a cluster.
#SBATCH --job-name=mmdlm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

export MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
PROGRAM="$(mmdlm path train/supervised)"
SETTINGS="$(dirname "$PROGRAM")/accelerate/fsdp2.yaml"

# The machine's rank is known inside srun only, so that line is expanded there.
srun --kill-on-bad-exit=1 bash -c '
    accelerate launch --config_file "$0" --num_machines "$SLURM_NNODES" \
        --num_processes $((SLURM_NNODES * SLURM_GPUS_ON_NODE)) --machine_rank "$SLURM_NODEID" \
        --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" "${@:1}"
' "$SETTINGS" "$PROGRAM" "$@" | tee -a "slurm-$SLURM_JOB_ID.lines"

# The last line says {"stopped": "SIGTERM"} where there is more to do.
if tail -n 1 "slurm-$SLURM_JOB_ID.lines" | grep -q '"stopped"'; then
    scontrol requeue "$SLURM_JOB_ID"
fi
