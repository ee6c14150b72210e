"""Data sets as tensors that the Trainer can draw batches from."""

from hf_teleport.data.images import ImageTensors, load_images

__all__ = ["ImageTensors", "load_images"]
