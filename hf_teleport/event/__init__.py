"""The parts of a teleport event around its method: its cost, its steps, the guard that undoes them, and measurements."""
