"""Layers on one batch: which weights read which inputs, the loss and its gradients there, and what may move."""
