"""Steps, stages, checkpoints, signals and logs; knows not which method runs."""
