"""A Trainer's run with teleports: its settings, when and on which batches, what happens between steps, what is told of it."""
