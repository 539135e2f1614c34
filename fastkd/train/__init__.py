"""Floor 5: steps, stages, checkpoints, signals and logs; knows not which method runs."""
