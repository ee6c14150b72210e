"""Experiments: every arm at every learning rate with every seed, on the same data, from one YAML file.

hf-teleport experiment configs/paper/cpu/mnist_sgd.yaml
hf-teleport plot runs/cpu/mnist_sgd
hf-teleport compare configs/compare/mnist_mlp_sgd.yaml
"""
