"""The tables of docs/results.md are what scripts/studies/tables.py makes of the committed evaluations."""

import json
from pathlib import Path

import pandas as pd
import pytest
from studies import tables

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"


def lines_of(name, reference):
    return tables.comparison(pd.read_csv(RESULTS / name), reference)


@pytest.mark.parametrize(
    ("name", "reference", "columns"),
    [
        ("following_one_rate.csv", ("baseline", 0.004), (3, 4, 5, 6)),
        ("following_two_rates.csv", ("baseline", 0.001), (3, 4, 5, 6)),
        ("following_symmetries.csv", ("baseline", 0.001), (3, 4, 6)),
    ],
)
def test_the_page_has_the_numbers_of_the_table(name, reference, columns):
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    for line in lines_of(name, reference)[2:]:
        cells = line.split("|")
        for column in columns:
            assert cells[column].strip() in page, line


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("ptb_tuned.csv", ("baseline+embedding_learning_rate-0.032+warmup_steps-20+weight_decay-0.1", 0.001)),
        ("python_tuned.csv", ("baseline", 0.001)),
        ("quickstart_tuned.csv", ("baseline", 0.0005)),
    ],
)
def test_the_page_has_the_numbers_of_the_tuned_arms(name, reference):
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    best = {}
    for line in lines_of(name, reference)[2:]:
        cells = [cell.strip() for cell in line.split("|")]
        best.setdefault(cells[1].partition("+")[0], []).append((float(cells[3].split()[0]), cells))
    assert best.keys() >= {"baseline", "following"}
    for _, cells in map(min, best.values()):
        assert f"| {cells[3]} | {cells[4]} | {cells[6]}" in page, cells


@pytest.mark.parametrize("name", ["fine_tuning.csv", "following_variants.csv", "python_scale.csv", "tuned_tasks.csv"])
def test_the_page_has_the_table_of_several_experiments(name):
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    table = "\n".join(tables.pairs(pd.read_csv(RESULTS / name), "baseline"))
    assert f"\n\n{table}\n\n" in page


def test_each_arm_of_several_experiments_is_compared_seed_by_seed_at_its_own_best_rate(tmp_path):
    ends = {("baseline", 0.1): (1.0, 2.0), ("baseline", 0.2): (0.5,), ("basis", 0.2): (0.9, 1.7)}
    ends |= {("random", 0.1): (0.9, 2.7), ("reset", 0.1): (3.0, 3.0)}
    for (arm, rate), losses in ends.items():
        for seed, loss in enumerate(losses):
            folder = tmp_path / "runs" / "tied_full" / arm / f"lr{rate}" / f"seed{seed}"
            folder.mkdir(parents=True)
            (folder / "settings.json").write_text(json.dumps({"arm": arm, "learning_rate": rate, "seed": seed}))
            row = {"step": 3, "seconds": 1.0, "cpu_seconds": 1.0, "eval_train_loss": loss, "eval_test_loss": 2 * loss}
            (folder / "history.json").write_text(json.dumps([row]))
            (folder / "done").touch()
    (tmp_path / "runs" / "tied_full" / "experiment.yaml").touch()
    tables.export(tmp_path / "runs", tmp_path / "all.csv")
    line, random, reset = tables.pairs(pd.read_csv(tmp_path / "all.csv"), "baseline")[2:]
    # 0.2 has the baseline's lowest loss, but with one seed alone.
    assert line == "| tied full | basis | 0.1, 0.2 | 1.5 ± 6.4 | 1.3 ± 5.1 | -0.2 ± 1.3 | -0.4 ± 2.5 | x 1 |"
    assert random.endswith("| x 1 (1 of 2 seeds) |")
    assert reset.endswith("| never |")


def test_a_searched_arm_is_compared_at_its_best_settings():
    runs = [("baseline", 0.1, 0, 3.0), ("baseline+warmup_steps-20", 0.1, 0, 2.0), ("baseline+warmup_steps-20", 0.1, 1, 4.0)]
    runs += [("muon+weight_decay-5e-05+warmup_steps-20", 0.2, 0, 1.0), ("muon", 0.2, 0, 1.5), ("muon.identity", 0.2, 0, 0.5)]
    frame = pd.DataFrame(runs, columns=["arm", "learning_rate", "seed", "train_loss"])
    frame = frame.assign(experiment="tiny", step=9, samples=9, cpu_seconds=1.0, test_loss=1.0, metric=0.0)
    (line,) = tables.pairs(frame, "baseline")[2:]
    assert [cell.strip() for cell in line.split("|")][2:7] == [
        *("muon", "0.1 (warmup steps 20), 0.2 (weight decay 5e-05; warmup steps 20)", "3 ± 13", "1", "-1"),
    ]


def test_trials_are_sorted_within_an_arm_and_are_those_of_the_first_seed():
    rows = [("b", 0, 2.0), ("b+x-1", 0, 1.0), ("a", 0, 3.0), ("a", 1, 0.5)]
    frame = pd.DataFrame(rows, columns=["arm", "seed", "train_loss"]).assign(learning_rate=0.1, step=9, test_loss=1.0)
    assert [line.split("|")[1].strip() for line in tables.trials(frame)[2:]] == ["a", "b+x-1", "b"]


def test_an_arm_without_several_seeds_is_no_reference(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["tables.py", str(RESULTS / "following_one_rate.csv"), "--reference", "muon"])
    with pytest.raises(SystemExit, match="--reference muon is not allowed; allowed: one of \\['baseline', 'following'\\]"):
        tables.main()
