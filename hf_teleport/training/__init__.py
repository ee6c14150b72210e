"""A Trainer's run with teleports: its settings and schedule, the batches, the work between steps, the summary and the card."""
