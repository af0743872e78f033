"""What the training programs share: checkpoints that survive a kill, run logs, learning-rate schedules, moving averages."""
