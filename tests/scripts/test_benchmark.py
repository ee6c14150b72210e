"""The benchmark on tiny sizes: that it measures what it says."""

import csv
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "bench"))

import benchmark
import benchmark_contestants as contestants
from benchmark_models import FAMILIES, QUICK_SAMPLES, Work, build, loss_fn, mlp
from benchmark_race import Course, Measured, peak_memory

from hf_teleport.layers.point import evaluate
from hf_teleport.layers.subspace import Subspace
from hf_teleport.weights.isolation import evaluation_mode

import forks

CPU = torch.device("cpu")
MEGA = 2**20


def tensor_of(size):
    return torch.empty(size, dtype=torch.uint8)


def test_peak_memory_is_of_what_lives_at_once():
    def ready():
        brief = tensor_of(16 * MEGA)
        del brief
        kept = tensor_of(3 * MEGA)

        def run():
            first = tensor_of(4 * MEGA)
            second = tensor_of(2 * MEGA)
            del first
            third = tensor_of(MEGA)
            return kept, second, third

        return run

    before = tensor_of(64 * MEGA)
    assert peak_memory(ready, CPU) == (3 + 4 + 2) * MEGA
    del before
    assert peak_memory(lambda: lambda: None, CPU) == 0


def test_contestants_take_turns_and_only_their_runs_are_timed():
    now, order = [0.0], []

    def contestant(name, seconds):
        def ready():
            now[0] += 100

            def run():
                now[0] += seconds
                order.append(name)
                return 5 if name == "b" else None

            return run

        return ready

    def restore():
        now[0] += 10

    course = Course(CPU, lambda: now[0], budget=0, fewest=3)
    found = course.race({"a": contestant("a", 1), "b": contestant("b", 2)}, held=7, restore=restore)
    assert order == ["a", "b"] * 4  # the first time for memory
    assert found["a"].seconds == [1] * 3
    assert found["b"].seconds == [2] * 3
    assert (found["a"].steps, found["b"].steps) == (None, 5)
    assert found["a"].peak_bytes >= 7


def test_a_ratio_is_the_median_of_each_round():
    found = {"fit": Measured(3, [1.0, 6.0, 8.0]), "svd_fit": Measured(4, [2.0, 2.0, 4.0])}
    assert benchmark.ratio("fit/svd_fit", found) == 2
    assert benchmark.ratio("event/paper_event", found) is None
    assert benchmark.ratio("peak_memory/train_step", found) is None
    found |= {"teleport_step": Measured(30, [1.0]), "update": Measured(20, [1.0]), "train_step": Measured(10, [1.0])}
    assert benchmark.ratio("peak_memory/train_step", found) == 1.5


@pytest.mark.parametrize(("rows", "width", "rank"), [(9, 6, 4), (9, 6, 6), (4, 6, 4), (4, 6, 2)])
def test_all_fits_find_the_same_space(rows, width, rank):
    matrix = (torch.randn(rows, rank) @ torch.randn(rank, width)).unsqueeze(0)
    core = contestants.svd_fit(matrix)
    assert core.shape == (1, width, rank)
    gram = contestants.gram_fit(matrix)
    torch.testing.assert_close(gram @ gram.mT, core @ core.mT, atol=1e-4, rtol=0)
    own = contestants.fit(matrix)
    spans_null = own.shape[-1] == 0 or float((matrix @ own).norm()) < 1e-3
    part = Subspace(own, spans_null, 0, width, rows).project(matrix.mT @ matrix + torch.eye(width))
    torch.testing.assert_close(part, torch.eye(width) - core @ core.mT, atol=1e-3, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_a_step_of_each_kind(family):
    name = f"{family}-{16 if family == 'cnn' else 64}x2"
    for hessian in ("fast", "exact"):
        work = build(name, CPU, quick=True)
        weights = [p.detach().clone() for p in work.model.parameters()]
        work.train_step(update=True)
        assert all(torch.equal(a, b) for a, b in zip(weights, work.model.parameters(), strict=True))
        turn = contestants.Turn(work, hessian)
        before = turn.point
        turn()
        after = turn.point
        assert after.grad_norm > before.grad_norm
        fresh = evaluate(work.model.eval(), loss_fn, work.batch, seed=0)
        assert fresh.loss == pytest.approx(before.loss, rel=1e-4)
        assert fresh.grad_norm == pytest.approx(after.grad_norm, rel=1e-3)
        work.restore()
        assert all(torch.equal(a, b) for a, b in zip(weights, work.model.parameters(), strict=True))


def test_held_counts_weights_and_two_moments():
    work = build("mlp-32x2", CPU, quick=True)
    weights = sum(p.nbytes for p in work.model.parameters())
    batch = QUICK_SAMPLES * (28 * 28 * 4 + 8)
    steps = 4 * len(list(work.model.parameters()))
    assert work.held() == 3 * weights + batch + steps


def test_the_papers_event_is_the_packages_exact_one_in_batch_scope(monkeypatch):
    monkeypatch.setattr(contestants, "_SHORT", 0.01)
    work = build("mlp-64x2", CPU, quick=True)
    batches = [work.draw(8), work.draw(8)]
    first = torch.nn.utils.parameters_to_vector(work.model.parameters()).detach()

    def moved(run):
        steps = run()
        change = torch.nn.utils.parameters_to_vector(work.model.parameters()).detach() - first
        work.restore()
        assert steps == 4
        return change

    with evaluation_mode(work.model):
        own = moved(contestants.event(work, batches, 2, scope="batch", hessian="exact"))
        paper = moved(contestants.paper_event(work, batches, 2))
    assert own.norm() > 0
    assert (own - paper).norm() < 0.05 * own.norm()


def test_symmetry_applies_to_the_mlp():
    work = build("mlp-32x2", CPU, quick=True)
    assert contestants.event(work, [work.draw(8), work.draw(8)], 2, method="symmetry")() == 4


@pytest.mark.parametrize("name", ["mlp", "mlp-32", "mlp-axb", "resnet-32x2"])
def test_a_name_that_is_no_model_is_refused(name):
    with pytest.raises(ValueError, match="allowed: FAMILY-WIDTHxDEPTH"):
        build(name, CPU)


def test_the_whole_benchmark(tmp_path, monkeypatch, capsys):
    file = tmp_path / "new" / "results.json"
    words = ["--quick", "--rounds", "1", "--budget", "0", "--steps", "1", "--threads", "1", "--cpu_time", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--models", "mlp-64x2", "gpt2-32x1", *words])
    benchmark.main()
    entries = {entry["model"]: entry for entry in json.loads(file.read_text())}
    assert list(entries)[:2] == ["mlp-64x2", "gpt2-32x1"]
    for entry in entries.values():
        assert list(entry["ratios"]) == benchmark.RATIOS
        assert all(r is None or r > 0 for r in entry["ratios"].values())
    mlp_entry, gpt2, *matrices = entries.values()
    assert None not in mlp_entry["ratios"].values()
    assert [key for key, r in gpt2["ratios"].items() if r is None] == ["event/symmetry_event"]
    assert all([key for key, r in entry["ratios"].items() if r is not None] == ["fit/svd_fit"] for entry in matrices)
    assert set(mlp_entry["event_steps"].values()) == {2}
    assert mlp_entry["clock"] == "process_time"
    out = capsys.readouterr().out
    assert "level_set_event" in out
    assert "symmetry_event" in out


def test_scaling_is_measured_fitted_and_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "BASE", {"t": 1, "d": 16, "n": 4, "l": 2, "b": 1})
    monkeypatch.setattr(benchmark, "SCALING", {"t": [1, 3], "b": [1, 2]})
    words = ["--quick", "--rounds", "1", "--budget", "0", "--device", "cpu"]
    rows = benchmark.scaling(benchmark.parse(words))
    assert [(row["size"], row["value"], row["steps"]) for row in rows if row["method"] == "null_space"] == [
        ("t", 1, 1),
        ("t", 3, 3),
        ("b", 1, 1),
        ("b", 2, 2),
    ]
    table = benchmark.draw_scaling(rows, tmp_path / "plots" / "scaling.png")
    assert table.row_count == 2
    assert (tmp_path / "plots" / "scaling.png").stat().st_size > 1000
    with (tmp_path / "plots" / "scaling.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [float(row["seconds"]) for row in read] == [row["seconds"] for row in rows]


def test_an_exponent_is_that_of_a_power_law():
    values = [1.0, 2.0, 4.0, 8.0]
    assert benchmark.exponent(values, [3 * v**1.5 for v in values]) == pytest.approx(1.5)


def test_scaling_sizes_leave_a_null_space():
    for size, values in benchmark.SCALING.items():
        for value in values:
            at = benchmark.BASE | {size: value}
            assert at["b"] * at["n"] < min(at["d"], 16 * 16)


def test_work_draws_at_least_one_sample():
    work = Work(*mlp(8, 1, 2, image_size=4), CPU)
    assert len(work.draw(0)["labels"]) == 1


def test_decompositions_are_spread_over_processes(tmp_path, monkeypatch):
    from benchmark_ranks import main, mp

    start = mp.start_processes
    forks.start()
    monkeypatch.setattr(mp, "start_processes", lambda *args, **kwargs: start(*args, **{**kwargs, "start_method": "forkserver"}))
    words = ["--width", "24", "--blocks", "1", "--repeats", "1", "--processes", "1", "2"]
    found = main([*words, "--json", str(tmp_path / "ranks.json")])
    assert list(found["seconds"]) == [1, 2]
    assert all(seconds > 0 for seconds in found["seconds"].values())
    # As many times shorter as there are processes, until the largest layers are alone.
    assert found["llama_7b"][8] == pytest.approx(8, rel=0.01)
    assert 32 < found["llama_7b"][64] < 64
    assert json.loads((tmp_path / "ranks.json").read_text())["llama_7b"]["2"] == pytest.approx(2, rel=0.01)
