"""What a teleport does to the loss on data that took no part in it: before training, on the digits.

python scripts/drift.py
"""

import torch
from run_image_classification import build_model
from transformers import set_seed

from hf_teleport import TeleportConfig, Teleporter
from hf_teleport.lab.data import load_images


def main() -> None:
    train, test = load_images("digits")
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:256].split(32)
    batches = [{"pixel_values": train.images[rows], "labels": train.labels[rows]} for rows in chosen]
    held_out = {"pixel_values": test.images, "labels": test.labels}
    print("| model | tau | null dim | loss, teleport data | gradient norm | loss, test images |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in ("mlp", "cnn", "vit"):
        for tau in (1.0, 0.999, 0.99):
            set_seed(0)
            model = build_model(name, train).eval()
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
