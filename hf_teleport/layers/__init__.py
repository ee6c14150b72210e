"""A model's layers on one batch: which weight reads which input, the loss and its gradients, and which weights may move."""
