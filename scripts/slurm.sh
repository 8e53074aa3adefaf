#!/bin/bash
# One run as a SLURM job of any length, with graft's environment active:
#   sbatch scripts/slurm.sh experiment=cifar10_finetune
#   sbatch --ntasks-per-node=4 --gpus-per-node=4 scripts/slurm.sh trainer=ddp trainer.devices=4
# Two minutes before the time limit SLURM sends SIGUSR1: the run saves and has the job requeued. The
# job that starts again has the same id, by which `graft train` finds its run and goes on with it.
#SBATCH --job-name=graft
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
srun --kill-on-bad-exit=1 graft train "$@"
