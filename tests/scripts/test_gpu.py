"""The script for a GPU, on small sizes on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import config

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "bench"))

import gpu
import gpu_checks

import forks

CPU = torch.device("cpu")


def test_all_of_it_in_tiny(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_checks.subprocess, "run", forks.run)
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert gpu.main(["--device", "cpu", "--tiny", "--output", str(tmp_path / "out")]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["gpu.json"]
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())
    kinds = ["float32", "bf16", "compile", "gloo", "FSDP2"]
    assert {row["check"]: row["passed"] for row in found["checks"]} == {
        f"{kind}, {method}": True for kind in kinds for method in ("basis", "null_space")
    }
    assert all(entry["ratios"]["teleport_step/train_step"] > 0 for entry in found["ratios"])
    assert [row["arm"] for row in found["race"]] == ["adamw", "following", "muon"]
    for row in found["race"]:
        assert (row["steps"], row["learning_rate"]) == (gpu.PROBE_STEPS, gpu.RATES[row["arm"]])
        assert row["seconds"] * row["tokens_per_second"] == pytest.approx(20 * 4 * 32)
        assert row["train_loss"] < 6.3
    out = capsys.readouterr().out
    assert all(title in out for title in ("checks", "ratios", "race, 20 steps"))


def test_a_failed_check_is_reported():
    def fails():
        gpu_checks._require(False, "the loss rose\nand rose")

    row = gpu_checks.passed("some", fails)
    assert (row["passed"], row["said"]) == (False, "AssertionError: the loss rose")
    with pytest.raises(AssertionError, match="there were 0 events, not 2"):
        gpu_checks._judged([], 2)


@pytest.mark.parametrize(("error", "said"), [("first\nlast\n", "last"), ("", "it ended with the status -9")])
def test_ranks_that_left_nothing_are_reported(monkeypatch, error, said):
    monkeypatch.setattr(gpu_checks.subprocess, "run", lambda words, **_: subprocess.CompletedProcess(words, -9, "", error))
    assert gpu_checks.of_ranks(CPU) == [{"check": "ranks", "passed": False, "said": said, "seconds": 0.0}]


def test_fp16_is_checked_where_there_is_a_gradscaler():
    assert not any("fp16" in name for name in gpu_checks.checks(CPU))
    assert sum("fp16" in name for name in gpu_checks.checks(torch.device("cuda"))) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_what_to_do(capsys):
    with pytest.raises(SystemExit):
        gpu.parse([])
    assert "--device cuda is not allowed here; allowed: cpu" in capsys.readouterr().err
