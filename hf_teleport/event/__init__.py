"""One teleport event, except its method: measurements, steps, the guard that rejects steps, reasons; batches; estimated cost."""
