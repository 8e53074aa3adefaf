#!/bin/bash
# One run as a SLURM job of any length: sbatch scripts/slurm.sh experiment=cifar10_finetune trainer=ddp
# Two minutes before the time limit SLURM sends SIGUSR1; the run saves, and has the job requeued.
#SBATCH --job-name=graft
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

# A folder of this job's own: when the job starts again, the run that is in it goes on.
logs=${GRAFT_LOGS:-logs}/slurm-$SLURM_JOB_ID
if compgen -G "$logs/*/run.json" > /dev/null; then srun graft resume "$logs"/*/; else srun graft train paths.logs="$logs" "$@"; fi
