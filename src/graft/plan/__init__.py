"""Transfer plans: stages, freezing, parameter groups, schedules, LoRA; nothing that runs."""
