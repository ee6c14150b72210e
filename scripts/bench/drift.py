"""What a teleport does to the loss on data that took no part in it: before training, on the digits.

python scripts/bench/drift.py
"""

import torch
from transformers import set_seed

from hf_teleport import TeleportConfig, Teleporter
from hf_teleport.lab.workload import Workload

# Those of docs/results.md.
VIT = {"patch_size": 2, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
SIZES = {"mlp": {}, "cnn": {"channels": [1, 16, 32, 64]}, "vit": VIT}


def main() -> None:
    workloads = {name: Workload("digits", name, kind="image", sizes=sizes) for name, sizes in SIZES.items()}
    data = workloads["mlp"].load()
    train, test = data.train, data.test
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:256].split(32)
    batches = [{"pixel_values": train.images[rows], "labels": train.labels[rows]} for rows in chosen]
    held_out = {"pixel_values": test.images, "labels": test.labels}
    print("| model | tau | null dim | loss, teleport data | gradient norm | loss, test images |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, workload in workloads.items():
        for tau in (1.0, 0.999, 0.99):
            set_seed(0)
            model = workload.make_model(data).eval()
            with torch.no_grad():
                before = model(**held_out).loss
            report = Teleporter(model, TeleportConfig(energy_threshold=tau)).teleport(batches, lambda m, batch: m(**batch).loss)
            with torch.no_grad():
                after = model(**held_out).loss
            print(
                f"| {name} | {tau:g} | {report.null_dim} | {report.loss_before:.5f} to {report.loss_after:.5f} "
                f"| {report.grad_norm_before:.3f} to {report.grad_norm_after:.3f} | {before:.5f} to {after:.5f} |"
            )


if __name__ == "__main__":
    main()
