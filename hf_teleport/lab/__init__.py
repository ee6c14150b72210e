"""Experiments and comparisons from one YAML file: every arm at every learning rate with every seed, on the same data.

hf-teleport experiment configs/paper/cpu/mnist_sgd.yaml
hf-teleport plot runs/cpu/mnist_sgd
hf-teleport compare configs/compare/mnist_mlp_sgd.yaml
"""
