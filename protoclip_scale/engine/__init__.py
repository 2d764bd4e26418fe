"""The episode machine and what it runs on: steps, optimiser, schedules, ranks, checkpoints, the run log."""
