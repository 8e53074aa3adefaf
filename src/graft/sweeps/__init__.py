"""Many runs from one command: launchers, Optuna, SLURM, the summary of a sweep."""
