"""One teleport event, except its method: batches, estimated cost, steps, the guard that rejects steps, measurements, reasons."""
