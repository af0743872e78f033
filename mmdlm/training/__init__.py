"""What the training programs share: checkpoints that survive a kill, run logs, moving averages, their command line."""
