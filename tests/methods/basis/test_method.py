"""The method 'basis' in events and in training runs; tests/test_symmetry_*.py has the mathematics."""

import pytest
import torch
import transformers as tf
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from hf_teleport import TeleportConfig, Teleporter, TeleportTrainer
from hf_teleport.methods import BasisTurn
from hf_teleport.methods.basis.symmetry import Symmetry

from tiny_runs import arguments

VOCAB, LENGTH = 31, 12


class Tokens(Dataset):
    """Rows of tokens of which each depends on the one before."""

    def __init__(self, count=64):
        generator = torch.Generator().manual_seed(0)
        steps = torch.randint(1, 4, (count, LENGTH), generator=generator)
        self.rows = steps.cumsum(1) % VOCAB

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def batches(count=2, size=4):
    rows = Tokens().rows
    return [{"input_ids": rows[i * size : (i + 1) * size], "labels": rows[i * size : (i + 1) * size]} for i in range(count)]


def loss_fn(model, batch):
    return model(**batch).loss


def llama(dtype=torch.float32, **settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": VOCAB}
    return tf.LlamaForCausalLM(tf.LlamaConfig(**{**sizes, **settings})).to(dtype)


def gpt2():
    torch.manual_seed(0)
    return tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=LENGTH, vocab_size=VOCAB))


def trained(model, steps=3, optimizer_class=torch.optim.AdamW):
    optimizer = optimizer_class(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(model, batches(1)[0]).backward()
        optimizer.step()
    return optimizer


def basis(**settings):
    return TeleportConfig(method="basis", **settings)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def state_of(optimizer):
    return [v.clone() for kept in optimizer.state.values() for v in kept.values()]


def test_an_event_turns_all_it_finds_and_the_loss_stays():
    model = llama()
    optimizer = trained(model)
    before = model(**batches()[1]).logits
    report = Teleporter(model, basis(), optimizer=optimizer).teleport(batches(), loss_fn)
    assert (report.steps, report.stopped_because, report.rolled_back) == (1, "steps_done", False)
    assert {(s.kind, s.blocks, s.size) for s in report.symmetries if not s.reason} == {("stream", 1, 16), ("value_output", 2, 8)}
    assert torch.allclose(model(**batches()[1]).logits, before, atol=1e-5)
    assert 0 < report.misalignment < 1
    again = Teleporter(model, basis(), optimizer=optimizer).teleport(batches(), loss_fn)
    assert again.misalignment < 1e-3 < report.misalignment


def test_every_parameter_is_turned_or_has_a_reason():
    report = Teleporter(gpt2(), basis()).teleport(batches(), loss_fn)
    assert all(layer.moved != bool(layer.reason) for layer in report.layers)
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert reasons["transformer.h.0.mlp.c_fc.bias"].startswith("passes through")
    assert reasons["transformer.ln_f"] == BasisTurn.at_rest


def test_an_uneven_gain_that_cannot_be_folded_is_left_held_or_rounded():
    fresh = Teleporter(gpt2(), basis()).teleport(batches(), loss_fn)
    assert "stream" in {s.kind for s in fresh.symmetries if not s.reason}

    model = gpt2()
    trained(model)
    left = Teleporter(model, basis()).teleport(batches(), loss_fn)
    reasons = [s.reason for s in left.symmetries if s.kind == "stream" and s.size > 1]
    assert len(reasons) == 1
    assert "transformer.ln_f.weight is not uniform and cannot be folded" in reasons[0]

    rounded = Teleporter(model, basis(blocking_gains="round", max_loss_change=0.1)).teleport(batches(), loss_fn)
    assert "stream" in {s.kind for s in rounded.symmetries if not s.reason}
    assert 0 < abs(rounded.loss_after - rounded.loss_before) < 0.1 * rounded.loss_before
    gain = model.transformer.ln_f.weight
    assert torch.equal(gain, gain[:1].expand_as(gain))


def test_rounding_beyond_the_guard_is_undone():
    model = gpt2()
    optimizer = trained(model, steps=20)
    before, state = flat(model), state_of(optimizer)
    config = basis(blocking_gains="round", max_loss_change=1e-9)
    report = Teleporter(model, config, optimizer=optimizer).teleport(batches(), loss_fn)
    assert report.rolled_back
    assert report.stopped_because == "max_loss_change"
    assert torch.equal(flat(model), before)
    assert all(torch.equal(a, b) for a, b in zip(state_of(optimizer), state, strict=True))


def test_what_is_no_symmetry_is_found_out_and_undone(monkeypatch):
    found = BasisTurn._find

    def wrong(self, point):
        found(self, point)
        for symmetry in self._found:
            if symmetry.kind == "stream":
                symmetry.parts = symmetry.parts[:-1]  # a reader of the stream is forgotten

    monkeypatch.setattr(BasisTurn, "_find", wrong)
    model = llama()
    optimizer = trained(model)
    before, state = flat(model), state_of(optimizer)
    report = Teleporter(model, basis(max_loss_change=None), optimizer=optimizer).teleport(batches(), loss_fn)
    assert report.rolled_back
    assert report.stopped_because == "not_a_symmetry"
    assert torch.equal(flat(model), before)
    assert all(torch.equal(a, b) for a, b in zip(state_of(optimizer), state, strict=True))


def test_a_gradient_that_is_little_more_than_rounding_may_turn_as_rounding_does():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 4, bias=False))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0)
    inputs = torch.randn(32, 6)
    batch = inputs, inputs @ torch.randn(6, 4)

    def squares(model, batch):
        return ((model(batch[0]) - batch[1]) ** 2).mean()

    for _ in range(300):
        optimizer.zero_grad()
        squares(net, batch).backward()
        optimizer.step()
    before = flat(net)
    report = Teleporter(net, TeleportConfig(method="basis"), optimizer=optimizer).teleport([batch], squares)
    assert report.grad_norm_before < 1e-3
    assert report.stopped_because == "steps_done"
    assert not torch.equal(flat(net), before)


def test_the_optimizers_state_is_forgotten_if_wished():
    model = llama()
    optimizer = trained(model)
    Teleporter(model, basis(optimizer_state="reset"), optimizer=optimizer).teleport(batches(), loss_fn)
    assert not any(value.any() for value in optimizer.state[model.model.layers[0].mlp.down_proj.weight].values())


@pytest.mark.parametrize("second_moment", ["turn", "measure"])
def test_second_moments(second_moment):
    model = llama(torch.float64)
    optimizer = trained(model)
    weight = model.model.layers[0].mlp.down_proj.weight
    first, squares = (optimizer.state[weight][name].clone() for name in ("exp_avg", "exp_avg_sq"))
    Teleporter(model, basis(second_moment=second_moment), optimizer=optimizer).teleport(batches(), loss_fn)
    after = optimizer.state[weight]
    assert torch.isclose(after["exp_avg"].norm(), first.norm())
    assert not torch.allclose(after["exp_avg"], first, atol=0)
    assert torch.isclose(after["exp_avg_sq"].sum(), squares.sum())
    assert not torch.allclose(after["exp_avg_sq"], squares, atol=0)
    if second_moment == "measure":
        gradients = [torch.autograd.grad(loss_fn(model, batch), weight)[0].square() for batch in batches()]
        # Along the stream as measured; along the hidden units, which did not turn, as it was.
        share = sum(gradients).sum(1, keepdim=True) / sum(gradients).sum()
        expected = (0.98 * share + 0.02 / len(share)) * squares.sum(0)
        assert torch.allclose(after["exp_avg_sq"], expected, rtol=1e-3, atol=0)


def test_second_moments_are_measured_within_each_head_that_turned():
    """Queries and keys lie in the same weight as the values. Theirs stay, and a head keeps its sum."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**sizes, vocab_size=VOCAB, rotary_pct=1.0, use_cache=False)).double()
    optimizer = trained(model)
    weight = model.gpt_neox.layers[0].attention.query_key_value.weight
    before = optimizer.state[weight]["exp_avg_sq"].view(4, 3, 8, 32).clone()  # heads; queries, keys and values
    config = basis(second_moment="measure", symmetries=["value_output"])
    Teleporter(model, config, optimizer=optimizer).teleport(batches(), loss_fn)
    after = optimizer.state[weight]["exp_avg_sq"].view(4, 3, 8, 32)
    assert torch.equal(after[:, :2], before[:, :2])
    torch.testing.assert_close(after[:, 2].sum(1), before[:, 2].sum(1))
    gradients = [torch.autograd.grad(loss_fn(model, batch), weight)[0].square().view(4, 3, 8, 32)[:, 2] for batch in batches()]
    share = sum(gradients).sum(2, keepdim=True) / sum(gradients).sum((1, 2), keepdim=True)
    expected = (0.98 * share + 0.02 / 8) * before[:, 2].sum(1, keepdim=True)
    torch.testing.assert_close(after[:, 2], expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.Adamax, torch.optim.Adafactor])
def test_an_event_says_how_far_the_second_moments_moved(optimizer_class):
    """Of Adafactor's factors both count, and Adamax keeps roots of squares."""
    model = llama(torch.float64)
    optimizer = trained(model, optimizer_class=optimizer_class)

    def roots(parameter):
        kept = {name: value for name, value in optimizer.state[parameter].items() if name not in ("step", "exp_avg")}
        return torch.cat([(v if name == "exp_inf" else v.sqrt()).flatten() for name, v in kept.items()])

    parameters = dict(model.named_parameters())
    before = {name: roots(parameter).clone() for name, parameter in parameters.items()}
    report = Teleporter(model, basis(), optimizer=optimizer).teleport(batches(), loss_fn)
    moved = {layer.name: layer.second_moment_moved for layer in report.layers if layer.second_moment_moved is not None}
    assert {"model.layers.0.mlp.down_proj", "lm_head"} <= set(moved)
    for name, share in moved.items():
        parameter, old = parameters[f"{name}.weight"], before[f"{name}.weight"]
        assert share == pytest.approx(float((roots(parameter) - old).norm() / old.norm()), rel=1e-9, abs=1e-12)
    assert report.second_moment_moved == pytest.approx(sum(moved.values()) / len(moved))
    assert report.metrics()["second_moment_moved"] == report.second_moment_moved
    assert f"second moments moved by {report.second_moment_moved:.0%}" in report.summary()
    assert f"misalignment {report.misalignment:.3g} -> {report.misalignment_after:.3g}" in report.summary()


def test_without_averages_of_squares_nothing_is_said_of_them():
    model = llama()
    reports = [
        Teleporter(model, basis(), optimizer=None).teleport(batches(), loss_fn),
        Teleporter(model, basis(optimizer_state="reset"), optimizer=trained(model)).teleport(batches(), loss_fn),
    ]
    assert all(report.second_moment_moved is None for report in reports)
    assert "second moments" not in reports[0].summary()


def test_an_aligned_basis_is_left_alone():
    model = llama()
    Teleporter(model, basis()).teleport(batches(), loss_fn)
    before = flat(model)
    report = Teleporter(model, basis(min_misalignment=0.05)).teleport(batches(), loss_fn)
    assert (report.steps, report.stopped_because) == (0, "aligned")
    assert torch.equal(flat(model), before)


def test_only_chosen_symmetries_and_modules():
    report = Teleporter(llama(), basis(symmetries=["value_output"])).teleport(batches(), loss_fn)
    assert {s.kind for s in report.symmetries if not s.reason} == {"value_output"}
    assert "stream is not among the chosen symmetries" in {s.reason for s in report.symmetries}
    report = Teleporter(llama(), basis(target_modules=["v_proj", "o_proj"])).teleport(batches(), loss_fn)
    assert {layer.name.rsplit(".", 1)[-1] for layer in report.layers if layer.moved} == {"v_proj", "o_proj"}


@pytest.mark.parametrize("kind", ["gradient", "predicted_decrease", "activation", "random"])
def test_every_basis_keeps_the_loss(kind):
    model = llama(torch.float64)
    trained(model)
    before = flat(model)
    report = Teleporter(model, basis(basis=kind, symmetries=["stream", "value_output", "scaling"])).teleport(batches(), loss_fn)
    assert report.steps == 1
    assert abs(report.loss_after - report.loss_before) < 1e-6
    assert not torch.allclose(flat(model), before)


def test_the_identity_folds_gains_and_turns_nothing():
    model = llama(torch.float64)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    Teleporter(model, basis(basis="identity")).teleport(batches(), loss_fn)
    assert all(torch.allclose(p, before[name], atol=1e-15) for name, p in model.named_parameters())


def test_an_optimizer_that_does_not_see_the_basis_is_refused():
    model = llama()
    with pytest.raises(ValueError, match=r"does nothing for SGD.*AdamW"):
        Teleporter(model, basis(), optimizer=torch.optim.SGD(model.parameters(), lr=0.1)).teleport(batches(), loss_fn)


def test_a_model_without_symmetries_says_so(caplog):
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    data, loss = torch.randn(5, 4), lambda model, batch: model(batch).square().mean()
    with pytest.raises(ValueError, match="passes through gelu"):
        Teleporter(model, basis()).check(data, loss).require_movable()
    with caplog.at_level("WARNING"):
        report = Teleporter(model, basis()).teleport([data], loss)
    assert (report.steps, report.stopped_because) == (0, "nothing_movable")
    assert "passes through gelu" in caplog.text


# --- in the trainer -------------------------------------------------------------------------------------------------------


def trainer(tmp_path, model, config, callbacks=(), **settings):
    args = arguments(tmp_path, **{"max_steps": 8, "per_device_train_batch_size": 8, **settings})
    return TeleportTrainer(model, args, train_dataset=Tokens(), teleport_config=config, callbacks=list(callbacks))


def test_before_listed_steps_and_every_so_many(tmp_path, caplog):
    run = trainer(tmp_path, llama(), basis(steps=[2], every_steps=3, num_batches=2))
    with caplog.at_level("INFO", logger="hf_teleport.trainer"):
        run.train()
    assert [report.steps for report in run.teleport_reports] == [1, 1]
    logged = [entry for entry in run.state.log_history if "teleport/misalignment" in entry]
    assert [entry["step"] for entry in logged] == [2, 5]
    assert "before steps 2, 5" in caplog.text


def test_null_space_and_basis_in_one_event(tmp_path):
    run = trainer(tmp_path, llama(), TeleportConfig(method="null_space+basis", steps=[1], num_batches=1, batch_size=1))
    run.train()
    assert [report.method for report in run.teleport_reports] == ["null_space", "basis"]
    assert run.teleport_reports[1].steps == 1


def test_a_resumed_run_ends_with_the_same_weights_and_optimizer(tmp_path):
    config = basis(steps=[3], num_batches=2)
    whole = trainer(tmp_path / "whole", llama(), config, save_strategy="steps", save_steps=2)
    whole.train()
    for checkpoint in ("checkpoint-2", "checkpoint-4"):
        resumed = trainer(tmp_path / "resumed", llama(), config)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / checkpoint))
        assert torch.equal(flat(resumed.model), flat(whole.model))
        assert all(torch.equal(a, b) for a, b in zip(state_of(resumed.optimizer), state_of(whole.optimizer), strict=True))


def test_held_gains_stay_uniform_until_the_first_event(tmp_path, caplog):
    gains = {}

    class Watch(tf.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            gains[state.global_step] = model.transformer.ln_f.weight.detach().clone()

    run = trainer(tmp_path, gpt2(), basis(steps=[4], num_batches=2, blocking_gains="hold"), callbacks=[Watch()])
    with caplog.at_level("INFO", logger="hf_teleport.trainer"):
        run.train()
    assert "Gains that are not trained until the last teleport (blocking_gains): 1." in caplog.text
    assert "stream" in {s.kind for s in run.teleport_reports[0].symmetries if not s.reason}
    assert all(torch.equal(gains[step], torch.ones(16)) for step in range(1, 5))
    assert not torch.equal(gains[6], torch.ones(16))


def test_sgd_is_refused_before_the_first_step(tmp_path):
    run = trainer(tmp_path, llama(), basis(steps=[4]), optim="sgd")
    with pytest.raises(ValueError, match="does nothing for SGD"):
        run.train()
    assert run.state.global_step == 0


def test_training_sees_the_same_batches_and_a_turn_at_the_end_changes_no_prediction(tmp_path):
    plain = Trainer(
        llama(),
        TrainingArguments(**{**trainer(tmp_path, llama(), basis(steps=[7])).args.to_dict(), "output_dir": str(tmp_path)}),
        train_dataset=Tokens(),
    )
    turned = trainer(tmp_path, llama(), basis(steps=[7], num_batches=2), learning_rate=1e-2)
    turned.train()
    plain.train()
    steps = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (plain, turned)]
    assert steps[0] == pytest.approx(steps[1], rel=1e-4)
    assert len(steps[0]) == 8


def test_the_trainers_own_optimizer_is_turned(tmp_path):
    moments = []

    class Looking(TeleportTrainer):
        def teleport(self):
            weight = self.model.model.layers[0].mlp.down_proj.weight
            moments.append(self.optimizer.state[weight]["exp_avg"].clone())
            report = super().teleport()
            moments.append(self.optimizer.state[weight]["exp_avg"].clone())
            return report

    usual = trainer(tmp_path, llama(), basis(steps=[4], num_batches=2))
    Looking(usual.model, usual.args, train_dataset=Tokens(), teleport_config=usual.teleport_config).train()
    before, after = moments
    assert torch.isclose(before.norm(), after.norm())
    assert not torch.allclose(before, after, rtol=0.1)


def test_symmetries_are_in_the_report_as_json():
    report = Teleporter(llama(), basis()).teleport(batches(), loss_fn).to_dict()
    names = {"kind", "name", "blocks", "size", "weights", "misalignment", "misalignment_after", "angle", "reason"}
    assert names == set(report["symmetries"][0])
    assert report["misalignment"] > 0


def test_symmetry_parameters_are_listed_once():
    part = nn.Parameter(torch.ones(2))
    assert Symmetry("chain", "x", 1, 2, gains=[part, part]).parameters == [part]


def test_what_is_blocked_later_costs_an_event_and_not_the_run(tmp_path):
    run = trainer(tmp_path, gpt2(), basis(steps=[4], num_batches=1, symmetries=["stream"]))
    run.train()
    assert run.state.global_step == 8
    assert run.teleport_reports[0].stopped_because == "nothing_movable"


@pytest.mark.parametrize("epsilon", [1e-6, 1e-5, 1e-2])
def test_a_norm_is_one_whatever_its_epsilon(epsilon):
    report = Teleporter(llama(rms_norm_eps=epsilon), basis()).teleport(batches(), loss_fn)
    assert "stream" in {s.kind for s in report.symmetries if not s.reason}


def test_under_activation_checkpointing(tmp_path):
    run = trainer(tmp_path, llama(), basis(steps=[2], num_batches=1), activation_checkpointing=True)
    run.train()
    assert "stream" in {s.kind for s in run.teleport_reports[0].symmetries if not s.reason}


class Branches(nn.Module):
    """Another branch for each task, after what they share."""

    def __init__(self):
        super().__init__()
        self.down = nn.Linear(6, 4, bias=False)
        self.branches = nn.ModuleList([nn.Linear(4, 8, bias=False), nn.Linear(4, 8, bias=False)])
        self.out = nn.Linear(8, 2)

    def forward(self, task, x):
        return self.out(torch.relu(self.branches[task](self.down(x)))).square().mean()


def test_a_branch_that_only_a_later_batch_takes_is_not_left_behind():
    torch.manual_seed(0)
    model = Branches()
    batches = [(0, torch.randn(5, 6)), (1, torch.randn(5, 6))]
    before = [model(*batch).item() for batch in batches]
    Teleporter(model, basis()).teleport(batches, lambda model, batch: model(*batch))
    assert [model(*batch).item() for batch in batches] == pytest.approx(before, rel=0.01)
