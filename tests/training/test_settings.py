"""Settings are read when training begins: those given, else those of the training arguments as they are by then."""

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from hf_teleport import TeleportConfig, TeleportTrainer, TeleportTrainingArguments
from hf_teleport.journal import read

from tiny_runs import Texts, arguments, flat, llama, pad, teleports

FEW = {"teleport_method": "null_space", "teleport_num_batches": 1, "teleport_batch_size": 1}


def trainer(folder, made=None, config=None, arguments_class=TeleportTrainingArguments, **settings):
    """A trainer whose settings stand in its arguments."""
    own = FEW if arguments_class is TeleportTrainingArguments and config is None else {}
    args = arguments(folder, arguments_class, max_steps=4, **{**own, **settings})
    given = {"train_dataset": Texts(), "eval_dataset": Texts(7, seed=1), "data_collator": pad, **(made or {})}
    if "model_init" not in given:
        given["model"] = llama()
    return TeleportTrainer(args=args, teleport_config=config, **given)


def events(run):
    return [row["step"] for row in run.state.log_history if "teleport/steps" in row]


def test_arguments_that_are_changed_later_count(tmp_path):
    run = trainer(tmp_path, teleport_epochs="0")
    run.args.teleport_steps = "1,3"
    run.args.teleport_num_batches = 2
    run.train()
    assert events(run) == [1, 3]
    assert run.teleport_config.num_batches == read(tmp_path)["config"]["num_batches"] == 2
    run.args.teleport_steps = "2"
    run.train()
    assert events(run) == [2]


def test_other_arguments_count(tmp_path):
    others = arguments(tmp_path, TeleportTrainingArguments, max_steps=4, teleport_steps=[3], **FEW)
    run = trainer(tmp_path, teleport_epochs="0")
    run.args = others
    run.train()
    assert events(run) == [3]


def test_a_config_that_is_assigned_later_counts_and_none_goes_back_to_the_arguments(tmp_path):
    run = trainer(tmp_path, teleport_steps="1")
    run.teleport_config = teleports("null_space", steps=[2])
    assert run.teleport_config.steps == [2]
    run.train()
    assert events(run) == [2]
    run.teleport_config = None
    run.train()
    assert events(run) == [1]


def test_a_config_that_is_changed_in_place_counts_and_is_looked_at(tmp_path):
    run = trainer(tmp_path, config=teleports("null_space", steps=[]))
    run.teleport_config.steps = "1,2"  # as on the command line
    run.train()
    assert events(run) == [1, 2]
    run.teleport_config.num_batches = 0
    with pytest.raises(ValueError, match="num_batches = 0 is not allowed"):
        run.train()


def test_a_config_of_the_arguments_can_be_changed_in_place(tmp_path):
    run = trainer(tmp_path, teleport_steps="1")
    run.teleport_config.steps = [3]
    run.train()
    assert events(run) == [3]


def test_arguments_that_are_changed_beside_a_given_config_are_refused_before_training(tmp_path):
    run = trainer(tmp_path, config=teleports("null_space", steps=[1]))
    run.args.teleport_steps = "2"
    before = flat(run.model)
    with pytest.raises(ValueError, match=r"two places: .*steps=\[1\].*steps=\[2\].*teleport_config = None"):
        run.train()
    assert torch.equal(flat(run.model), before)
    run.teleport_config = None
    run.train()
    assert events(run) == [2]


def test_plain_arguments_have_no_settings(tmp_path):
    run = trainer(tmp_path, config=teleports("null_space", steps=[1]), arguments_class=TrainingArguments)
    run.args.learning_rate = 0.5
    assert run.teleport_config.steps == [1]


def test_a_change_in_mid_run_counts_from_the_next_run_on(tmp_path):
    class Change(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            args.teleport_num_batches = 3

    run = trainer(tmp_path, {"callbacks": [Change()]}, teleport_steps="2")
    drawn = []
    run._draw = lambda count, event, real=run._draw: (drawn.append(count), real(count, event))[1]
    run.train()
    assert drawn == [1, 1], "for the check, and for the event"
    run.train()
    assert drawn[2:] == [1, 3]


def test_a_teleport_by_hand_goes_by_the_settings_of_now_also_after_a_run_that_failed(tmp_path):
    class Fail(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise RuntimeError("the cable was pulled")

    run = trainer(tmp_path, {"callbacks": [Fail()]}, teleport_steps="3")
    with pytest.raises(RuntimeError, match="cable"):
        run.train()
    run.args.teleport_method = "basis"
    assert run.teleport().method == "basis"


# Searches by Trainer.


def search(folder, space, trials, **settings):
    """Search with an optuna that tries each of some points. Returns the objective and the events of each trial."""
    optuna = pytest.importorskip("optuna", reason="optuna is not installed: pip install optuna")
    found = []

    def objective(metrics):
        found.append((metrics["eval_loss"], events(run), [report.method for report in run.teleport_reports]))
        return metrics["eval_loss"]

    run = trainer(folder, {"model_init": lambda trial=None: llama()}, teleport_epochs="0", **settings)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    run.hyperparameter_search(
        hp_space=lambda trial: {name: trial.suggest_categorical(name, values) for name, values in space.items()},
        compute_objective=objective,
        n_trials=trials,
        backend="optuna",
        sampler=optuna.samplers.GridSampler(space, seed=0),
    )
    return found


def test_a_search_over_steps_methods_and_symmetries(tmp_path):
    space = {"teleport_steps": ["1", "1,3"], "teleport_method": ["null_space", "basis"]}
    found = search(tmp_path, space, 4)
    assert sorted((methods, steps) for _, steps, methods in found) == sorted(
        ([method] * len(steps), steps) for method in space["teleport_method"] for steps in ([1], [1, 3])
    )
    assert len({loss for loss, *_ in found}) == 4
    folders = [folder for folder in tmp_path.iterdir() if folder.name.startswith("run-")]
    kept = sorted(len(read(folder)["events"]) for folder in folders)
    assert kept == [1, 1, 2, 2], "each trial's events are in its own folder"


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("teleport_epochs", ["1", "[0]"]),
        ("teleport_learning_rate", [0.01, 0.05]),
        ("teleport_basis", ["gradient", "random"]),
        ("teleport_symmetries", ["stream", "value_output,query_key"]),
        ("teleport_target_modules", [r".*q_proj", r".*v_proj"]),
    ],
)
def test_a_search_over_one_argument(tmp_path, name, values):
    method = "basis" if name in ("teleport_basis", "teleport_symmetries") else "null_space"
    settings = {} if name == "teleport_epochs" else {"teleport_steps": "1"}
    found = search(tmp_path, {name: values}, 2, **{**settings, "teleport_method": method})
    assert [methods for *_, methods in found] == [[method]] * 2
    assert len({loss for loss, *_ in found}) == (1 if name == "teleport_epochs" else 2)


# What a message calls a setting.


@pytest.mark.parametrize("argued", [True, False])
@pytest.mark.parametrize(
    ("settings", "said"),
    [({"steps": [9]}, "`{}steps`"), ({"epochs": [7]}, "`{}epochs`"), ({"warmup_steps": 50}, "^{}warmup_steps = 50 outlasts")],
)
def test_a_schedule_that_cannot_be_is_said_by_the_name_that_the_user_wrote(tmp_path, argued, settings, said):
    if argued:
        run = trainer(tmp_path, **{f"teleport_{name}": value for name, value in settings.items()})
    else:
        run = trainer(tmp_path, config=TeleportConfig(method="null_space", **settings), arguments_class=TrainingArguments)
    with pytest.raises(ValueError, match=said.format("teleport_" if argued else "")):
        run.train()


def test_a_warm_up_that_outlasts_the_run_is_said_by_its_name(tmp_path):
    run = trainer(tmp_path, teleport_method="basis", teleport_warmup_steps=99)
    with pytest.raises(ValueError, match=r"^teleport_warmup_steps = 99: all teleports lie beyond the run"):
        run.train()
