"""A Trainer's run with teleports: when they come, what happens between steps, what is told at its end."""
