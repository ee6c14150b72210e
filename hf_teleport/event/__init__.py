"""One teleport event around its method: what it costs, its steps, the guard that undoes them, what was measured."""
