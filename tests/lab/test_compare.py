"""`hf-teleport compare` end to end on real rows: what is run, gone on with, judged and written."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml

from hf_teleport import TeleportTrainer
from hf_teleport.cli import main
from hf_teleport.lab.compare import AT_BASELINES, AT_OWN, compare, protocol
from hf_teleport.lab.report import FIGURE, NUMBERS, RECORD, sentences
from hf_teleport.lab.runs import execute
from hf_teleport.lab.settings import plan, read
from hf_teleport.lab.verdict import BETTER, ONE_SEED, interval, verdict
from hf_teleport.lab.workload import Workload

import ranks

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not SHARED.exists(), reason=f"needs the data sets in {SHARED}")


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mnist")
    for path in (SHARED / "mnist").glob("*.parquet"):
        pq.write_table(pq.read_table(path).slice(0, 120), folder / path.name)
    return folder


DEFAULTS = {
    "dataset": "mnist",
    "model": "mlp",
    "sizes": {"hidden_sizes": [24, 24]},
    "train_rows": 96,
    "test_rows": 40,
    "arms": {
        "baseline": {"teleport_epochs": 0},
        "null_space": {"teleport_method": "null_space", "teleport_epochs": 1, "teleport_steps_per_batch": 2},
    },
    "learning_rates": [0.1, 0.3, 0.5],
    "seeds": [0, 1],
    "num_train_epochs": 1,
    "per_device_train_batch_size": 16,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "eval_strategy": "steps",
    "eval_steps": 3,
    "save_strategy": "no",
    "logging_steps": 3,
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
    "teleport_num_batches": 2,
    "teleport_batch_size": 8,
}


@pytest.fixture
def config(tmp_path):
    """A function that writes a YAML file and returns its path: six steps."""

    def write(**settings):
        file = tmp_path / "tiny.yaml"
        both = {**DEFAULTS, "output_dir": str(tmp_path / "out"), **settings}
        file.write_text(yaml.safe_dump(both, sort_keys=False))
        return file

    return write


def planned(file, *words):
    return protocol(read(file, words))


BASIS = {"teleport_method": "basis", "teleport_steps": 3}
CONTROLS = ["warmup", "null_space.random_move", "null_space.matched_rate"]

# --- the protocol ---------------------------------------------------------------------------------------------------------


def arms_of(made):
    return {run.arm: run.training for run in made.whole.runs}


def test_controls_are_made_of_the_arms_that_they_suit(config):
    arms = {**DEFAULTS["arms"], "basis": BASIS, "sets": {"teleport_method": "level_set"}, "off": {"teleport_epochs": 0}}
    arms["per_batch"] = {"teleport_scope": "batch"}
    made = planned(config(arms=arms))
    assert made.arms == list(arms)
    controls = {name: training for name, training in arms_of(made).items() if name not in arms}
    assert list(controls) == [*CONTROLS, "basis.random_move", "basis.identity"]
    assert [controls[name].teleport_control for name in CONTROLS[1:]] == ["random_move", "matched_rate"]
    assert (controls["basis.random_move"].teleport_basis, controls["basis.random_move"].teleport_steps) == ("random", 3)
    assert controls["basis.identity"].teleport_basis == "identity"
    # As they were, but for that.
    assert controls["null_space.random_move"].teleport_epochs == 1
    assert controls["warmup"].teleport_epochs == 0


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ({}, (0.1, "constant_with_warmup")),
        # Without effect on a constant rate.
        ({"warmup_steps": 50}, (0.1, "constant_with_warmup")),
        ({"lr_scheduler_type": "cosine"}, (0.1, "cosine")),
        ({"lr_scheduler_type": "linear", "warmup_steps": 50}, (100, "linear")),
        ({"lr_scheduler_type": "cosine", "warmup_steps": 0.2}, (0.4, "cosine")),
        ({"lr_scheduler_type": "cosine", "warmup_steps": 0.5}, None),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, None),
    ],
)
def test_the_warm_up_is_a_tenth_or_twice_the_one_that_there_is(config, given, made):
    arms = arms_of(planned(config(**given)))
    control = arms.get("warmup")
    assert (control and (control.warmup_steps, control.lr_scheduler_type.value)) == made


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ([], []),
        (["warmup"], ["warmup"]),
        ("random_move", ["null_space.random_move"]),
        (["warmup", "matched_rate"], ["warmup", "null_space.matched_rate"]),
    ],
)
def test_controls_are_a_choice(config, given, names):
    assert list(arms_of(planned(config(controls=given))))[2:] == names


def test_an_arm_may_be_named_by_a_number(config):
    arms = {"baseline": {"teleport_epochs": 0}, 2: {"teleport_method": "basis"}, "gone": None}
    file = config(arms=arms, optim="adamw_torch")
    assert set(planned(file).whole.settings["arms"]) == {"baseline", "2"} <= {run.arm for run in planned(file).whole.runs}
    made = planned(file, "--arms.2.teleport_steps", "3")
    assert made.whole.settings["arms"]["2"] == {"teleport_method": "basis", "teleport_steps": "3"}


def test_stages(config):
    made = planned(config(seeds=[4, 0]))
    first = [(run.arm, run.learning_rate, run.seed) for run in made.grid().runs]
    assert first == [(arm, rate, 4) for arm in ("baseline", "null_space") for rate in (0.1, 0.3, 0.5)]
    best = {"baseline": 0.3, "null_space": 0.5}
    both = [(run.arm, run.learning_rate, run.seed) for run in made.second(best).runs]
    assert set(first) <= set(both)
    assert [row for row in both if row not in first] == [
        *((arm, 0.3, 4) for arm in CONTROLS),
        ("baseline", 0.3, 0),
        ("null_space", 0.3, 0),
        ("null_space", 0.5, 0),
        *((arm, 0.3, 0) for arm in CONTROLS),
    ]
    assert made.choices(best) == {AT_BASELINES: dict.fromkeys(("baseline", "null_space", *CONTROLS), 0.3), AT_OWN: best}


def ends(losses, seed=0):
    rows = [
        {"arm": arm, "learning_rate": rate, "seed": seed, "step": step, "train_loss": loss if step else 0.0}
        for arm, by_rate in losses.items()
        for rate, loss in by_rate.items()
        for step in (0, 6)
    ]
    return pd.DataFrame(rows)


def test_the_best_rate_has_the_lowest_final_loss_of_the_first_seed(config):
    made = planned(config())
    frame = ends({"baseline": {0.1: 3.0, 0.3: 2.0, 0.5: math.inf}, "null_space": {0.1: 1.0, 0.3: 2.0, 0.5: 3.0}})
    # Other runs in the folder, and a seed that only the second stage has run, change nothing.
    others = [ends({"baseline": {0.1: 0.1, 0.9: 0.1}}, seed=1), ends({"baseline": {0.9: 0.1}, "warmup": {0.1: 0.1}})]
    assert made.best(pd.concat([frame, *others])) == {"baseline": 0.3, "null_space": 0.1}


@pytest.mark.parametrize(
    ("best", "rates", "said"),
    [
        (0.1, [0.1, 0.3, 0.5], "the best rate, 0.1, is the lowest of the grid: give smaller ones"),
        (0.5, [0.1, 0.5, 0.3], "the best rate, 0.5, is the highest of the grid: give larger ones"),
        (0.3, [0.3], "one rate alone"),
        (None, [0.1, 0.3, 0.5], "it diverges at every learning rate"),
        (0.3, [0.1, 0.3, 0.5], None),
    ],
)
def test_a_best_rate_at_the_edge_of_the_grid_is_remarked_on(config, best, rates, said):
    made = planned(config(learning_rates=rates))
    remarks = made.remarks({"baseline": rates[0] if len(rates) == 1 else 0.3, "null_space": best})
    about = [remark for remark in remarks if remark.startswith("null_space: ")]
    assert (said in about[0]) if said else not about


def test_an_arm_that_always_diverges_has_no_rate_of_its_own_and_a_baseline_must_not(config):
    made = planned(config())
    assert made.choices({"baseline": 0.3, "null_space": None})[AT_OWN] == {"baseline": 0.3}
    with pytest.raises(ValueError, match=r"the baseline diverges at each of learning_rates = \[0.1, 0.3, 0.5\]"):
        made.choices({"baseline": None, "null_space": 0.3})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arms": {"null_space": {}}}, r"arms = \['null_space'\] is not allowed; allowed: one of them is 'baseline'"),
        ({"arms": {"baseline": {"teleport_epochs": 0}}}, r"allowed: one more"),
        ({"arms": {"baseline": {}, "null_space": {}}}, r"arm 'baseline' teleports"),
        ({"arms": {"baseline": {"teleport_epochs": 0, "teleport_steps": 3}, "b": {}}}, r"arm 'baseline' teleports"),
        ({"arms": {**DEFAULTS["arms"], "warmup": {}}}, r"arm 'warmup' is not allowed"),
        ({"eval_strategy": "no"}, r"'eval_strategy': 'no'.* allowed: eval_strategy 'steps' or 'epoch'"),
        ({"eval_on_start": False}, r"'eval_on_start': False"),
        ({"clock": "minutes"}, r"clock = 'minutes' is not allowed; allowed: one of \['seconds', 'cpu_seconds'\]"),
        ({"controls": ["random"]}, r"controls = \['random'\] is not allowed; allowed: some of \['warmup'"),
        ({"controls": {"warmup": 1}}, r"controls = .* is not allowed"),
        (
            {"arms": {**DEFAULTS["arms"], "null_space": BASIS}, "controls": ["matched_rate"]},
            r"'matched_rate' suits none of the arms",
        ),
        ({"control": ["warmup"]}, r"unknown key 'control' in the settings; the nearest is 'controls'"),
    ],
)
def test_wrong_settings_are_named_before_any_work(config, settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        planned(config(**settings))
    assert not (tmp_path / "out").exists()


# --- end to end -----------------------------------------------------------------------------------------------------------


def interrupted_after(count, monkeypatch, trained):
    """Note the folder of each run that trains, and let the run after so many be interrupted."""
    real = TeleportTrainer.train

    def train(self, *args, **kwargs):
        trained.append(Path(self.args.output_dir))
        if len(trained) > count:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(TeleportTrainer, "train", train)


@needs_data
def test_from_the_command_to_the_files(config, mnist, tmp_path, monkeypatch, capsys):
    """Interrupted in either stage it goes on; what is finished is only reported again."""
    file, folder = config(folder=str(mnist)), tmp_path / "out"
    trained = []
    for count, code in ((4, 130), (3, 130), (99, 0)):
        with monkeypatch.context() as patch:
            interrupted_after(count, patch, runs := [])
            assert main(["compare", str(file)]) == code
        trained += runs[:count]
    assert len(trained) == len(set(trained)) >= 6 + 2 * len(CONTROLS) + 2
    out = capsys.readouterr().out
    assert "no difference" in out or "better" in out or "worse" in out
    assert "of the grid: give" in out or json.loads((folder / RECORD).read_text())["remarks"] == []
    # Nothing is trained, and the numbers are the same.
    before = (folder / NUMBERS).read_text()
    with monkeypatch.context() as patch:
        patch.setattr(Workload, "load", lambda self: pytest.fail("there is nothing to do"))
        assert main(["compare", str(folder / "experiment.yaml")]) == 0
    assert (folder / NUMBERS).read_text() == before
    assert (folder / FIGURE).read_bytes().startswith(b"\x89PNG")

    numbers = pd.read_csv(folder / NUMBERS)
    assert set(numbers["arm"]) == {"baseline", "null_space", *CONTROLS}
    assert (numbers["seeds"] == 2).all()
    assert numbers.iloc[0]["word"] == "reference"
    record = json.loads((folder / RECORD).read_text())
    assert (record["clock"], record["seeds"], record["learning_rates"]) == ("seconds", [0, 1], [0.1, 0.3, 0.5])
    assert set(record["best_learning_rates"]) == {"baseline", "null_space"}
    assert [v["arm"] for v in record["verdicts"]] == list(numbers["arm"])
    assert record["verdicts"][1]["equal_time"]["mean"] == pytest.approx(numbers.iloc[1]["equal_time"])
    assert record["sentences"][0].startswith("null_space at ")

    # Two batches of eight and the one held back, before the first step.
    comparison = compare(planned(file))
    samples = comparison.frame[comparison.frame["seed"] == 0].groupby(["arm", "step"])["samples"].first()
    assert [samples["baseline", step] for step in (0, 3, 6)] == [0, 48, 96]
    assert [samples["null_space", step] for step in (0, 3, 6)] == [0, 72, 120]
    events = [
        [row for row in json.loads(path.read_text()) if "teleport/steps" in row]
        for path in sorted(folder.glob("*/lr*/seed0/history.json"))
        if path.parts[-4] == "null_space.matched_rate"
    ]
    assert all(row[0]["teleport/stopped_because"] == "matched_rate" for row in events)


@needs_data
def test_one_seed_has_no_interval_and_the_clock_may_be_cpu_time(config, mnist, capsys):
    file = config(folder=str(mnist), learning_rates=[0.3], seeds=[0], controls=[])
    assert main(["compare", str(file), "--clock", "cpu_seconds"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert ONE_SEED in out
    assert "by CPU seconds" in out
    assert "baseline: the grid has one rate alone, 0.3" in out


@needs_data
def test_the_bar_counts_the_runs_of_both_stages(config, mnist, capsys):
    file = config(folder=str(mnist), learning_rates=[0.1, 0.3], controls=["warmup"], disable_tqdm=False)
    assert main(["compare", str(file)]) == 0
    bars = capsys.readouterr().err
    assert "4/4" in bars
    total = len(list(Path(read(file)["output_dir"]).rglob("done")))
    assert f"4/{total}" in bars
    assert f"{total}/{total}" in bars


def in_processes(rank, size):
    """What one of several processes finds."""
    comparison = compare(protocol(read(os.environ["COMPARISON"], ["--per_device_train_batch_size", "8"])))
    return comparison.best, [verdict.arm for verdict in comparison.verdicts], int(comparison.frame["samples"].max())


@needs_data
def test_processes_compare_together(config, mnist, tmp_path, monkeypatch):
    monkeypatch.setenv("COMPARISON", str(config(folder=str(mnist), learning_rates=[0.1, 0.3], seeds=[0], controls=["warmup"])))
    first, second = ranks.run(in_processes, 2, tmp_path)
    assert first == second
    assert first[1][:3] == ["baseline", "null_space", "warmup"]
    assert first[2] == 6 * 16 + 3 * 8
    with pytest.raises(ValueError, match="processes = 1 is not allowed; allowed: 2"):
        compare(planned(config(folder=str(mnist), learning_rates=[0.1, 0.3], seeds=[0]), "--per_device_train_batch_size", "8"))


@needs_data
def test_basis_arms_have_a_random_basis_for_control(tmp_path):
    """On the first sentences of Penn Treebank."""
    (tmp_path / "ptb").mkdir()
    for path in (SHARED / "ptb").glob("*.parquet"):
        pq.write_table(pq.read_table(path).slice(0, 60), tmp_path / "ptb" / path.name)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    text = {"dataset": "ptb", "folder": str(tmp_path / "ptb"), "model": "llama", "sizes": sizes, "length": 16, "train_rows": 24}
    arms = {"baseline": {"teleport_epochs": 0}, "basis": {**BASIS, "teleport_steps": 1}}
    settings = {**DEFAULTS, **text, "arms": arms, "learning_rates": [1e-3], "seeds": [0], "optim": "adamw_torch"}
    settings |= {"per_device_train_batch_size": 8, "teleport_batch_size": 2, "output_dir": str(tmp_path / "out")}
    comparison = compare(protocol(settings))
    assert [v.arm for v in comparison.verdicts] == ["baseline", "basis", "warmup", "basis.random_move", "basis.identity"]
    for arm in ("basis", "basis.random_move"):
        (history,) = (tmp_path / "out" / arm).rglob("history.json")
        (event,) = [row for row in json.loads(history.read_text()) if "teleport/steps" in row]
        assert (event["teleport/method"], event["teleport/rolled_back"]) == ("basis", False)


def judged(losses, base):
    """The verdict on an arm by the final losses of its seeds and the baseline's, from 2.0 on, one second and sample a run."""
    rows = [
        {"arm": arm, "learning_rate": 0.1, "seed": seed, "step": at, "seconds": float(at), "samples": at, "train_loss": loss}
        for arm, ends_ in (("arm", losses), ("baseline", base))
        for seed, end in enumerate(ends_)
        for at, loss in enumerate((2.0, end))
    ]
    frame = pd.DataFrame(rows).assign(test_loss=0.0, metric=0.0)
    return verdict(frame, ("baseline", 0.1), ("arm", 0.1))


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (
            judged([1.5, 1.6], [1.0, 1.0]),
            "no difference that the seeds show. Training loss +0.55 ± 0.64 at equal seconds",
        ),
        (judged([1.5, 1.5], [1.0, 1.0]), "The baseline's final loss is reached by no seed."),
        (judged([0.0, 1.5], [1.0, 1.0]), "is reached in 0.5 times its own time, and never with 1 of 2 seeds."),
        (judged([1.0, 1.0], [2.0, 2.0]), "The baseline's final loss is reached at its start already."),
        (judged([math.inf, 1.0], [1.0, 1.0]), "arm at 0.1: worse; it diverged with 1 of 2 seeds."),
        (judged([1.0, 1.0], [math.inf, 1.0]), "arm at 0.1: no verdict: the baseline diverged with one of the seeds or more."),
    ],
)
def test_sentences(found, said):
    made = SimpleNamespace(arms=["baseline", "arm"], clock="seconds")
    (sentence,) = sentences(SimpleNamespace(verdicts=[found], remarks=[], protocol=made))
    assert said in sentence


def test_a_control_that_is_better_too_is_said():
    rows = pd.DataFrame(
        {"arm": "baseline", "learning_rate": 0.1, "seed": 0, "step": [0, 1], "seconds": [0.0, 1.0], "samples": [0, 1]}
        | {"train_loss": [2.0, 1.0], "test_loss": [2.0, 1.0], "metric": [0.0, 1.0]}
    )
    base = verdict(rows, ("baseline", 0.1), ("baseline", 0.1))
    better = replace(base, word=BETTER, equal_time=interval([-1.0, -1.1]))
    arms = ["null_space", "null_space.random_move", "basis", "basis.random_move"]
    found = [base, *(replace(better, arm=arm, word=BETTER if "space" in arm else base.word) for arm in arms)]
    made = SimpleNamespace(arms=arms[::2], clock="seconds")
    comparison = SimpleNamespace(verdicts=found, remarks=["about the grid"], protocol=made)
    said = sentences(comparison)
    assert said[0] == (
        "null_space at 0.1: better. Training loss -1.05 ± 0.64 at equal seconds, 0 at equal samples. "
        "The baseline's final loss is reached in 1 times its own time."
    )
    assert said[2:] == [
        "null_space is better, but so is its control null_space.random_move: the gain may not be the teleport's.",
        "about the grid",
    ]


# --- the files ------------------------------------------------------------------------------------------------------------

FILES = sorted((ROOT / "configs" / "compare").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_file_is_a_comparison(file):
    made = protocol(read(file))
    assert made.arms[:2] == ["baseline", "null_space"]
    assert len(made.seeds) >= 3
    assert len(made.rates) >= 3
    controls = {run.arm for run in made.whole.runs} - set(made.arms)
    assert set(CONTROLS) <= controls
    assert ("basis" in made.arms) == ("basis.random_move" in controls)
    assert made.whole.workload.dataset == "digits" or Path(made.whole.workload.folder).parts[:3] == ("..", "shared", "data")


@needs_data
@pytest.mark.parametrize("file", [file for file in FILES if "folder" in read(file)], ids=lambda file: file.stem)
def test_one_step_of_every_file_trains(file, tmp_path):
    """On the first rows of its data."""
    settings = read(file)
    folder = tmp_path / "data"
    folder.mkdir()
    for path in Path(ROOT, settings["folder"]).glob("*.parquet"):
        pq.write_table(pq.read_table(path).slice(0, 1500 if "etth1" in file.stem else 60), folder / path.name)
    short = {"folder": str(folder), "seeds": 0, "learning_rates": 1e-3, "max_steps": 1, "per_device_train_batch_size": 2}
    short |= {"train_rows": 4, "train_loss_rows": 2, "test_rows": 2, "eval_steps": 1, "disable_tqdm": True, "warmup_steps": 0}
    short |= {"vocabulary_size": 50} if "vocabulary_size" in settings else {}
    arms = {"baseline": {"teleport_epochs": 0}}
    experiment = plan({**settings, **short, "output_dir": str(tmp_path / "out"), "arms": arms})
    assert execute(experiment) == 1
    rows = json.loads((experiment.runs[0].folder / "history.json").read_text())
    assert all(math.isfinite(row["eval_test_loss"]) for row in rows if "eval_test_loss" in row)
