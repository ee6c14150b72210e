"""What real runs do besides: losses of other kinds, layers that act otherwise in training, evaluation, data."""

import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback

from hf_teleport import TeleportConfig, TeleportMixin, TeleportTrainer

from tiny_models import build
from tiny_runs import (
    METHODS,
    VOCAB,
    Stream,
    Texts,
    arguments,
    flat,
    gpt2,
    looking,
    make,
    moved,
    teleports,
)


def modes(trainer):
    return [module.training for module in trainer.model.modules()]


# --- the loss that is kept --------------------------------------------------------------------------------------------------


def by_hand(smoothing=0.0):
    """The mean loss of all tokens of the teleport batches, as in training with accumulation."""

    def look(trainer):
        batches = list(trainer.get_teleport_dataloader(2))[: trainer.teleport_config.num_batches]
        losses, tokens = [], []
        for batch in batches:
            logits, labels = trainer.model(**batch).logits.detach()[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
            uniform = -logits.log_softmax(-1)[labels != -100].mean()
            tokens.append(int((labels != -100).sum()))
            losses.append(tokens[-1] * ((1 - smoothing) * cross_entropy(logits, labels) + smoothing * uniform))
        return float(sum(losses) / sum(tokens))

    return look


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_loss_is_that_of_training_whatever_is_accumulated_and_padded(tmp_path, smoothing):
    settings = {"label_smoothing_factor": smoothing, "gradient_accumulation_steps": 3}
    run = make(tmp_path, config=teleports("null_space", batch_size=2), trainer_class=looking(by_hand(smoothing)), **settings)
    assert any((batch["labels"] == -100).any() for batch in list(run.get_teleport_dataloader(2))[:2])
    moved(run)
    report = run.teleport_reports[0]
    assert run.looked == pytest.approx((report.loss_before, report.loss_after), rel=1e-5)


def test_an_uneven_last_teleport_batch(tmp_path):
    rows = Texts(3)
    run = make(
        tmp_path, config=teleports(batch_size=2, num_batches=5), trainer_class=looking(by_hand()), made={"teleport_dataset": rows}
    )
    assert [len(batch["labels"]) for batch in run.get_teleport_dataloader(2)] == [2, 1]
    moved(run)
    assert run.looked[0] == pytest.approx(run.looked[1], rel=1e-4)


def test_dropout_is_off_inside(tmp_path):
    model = gpt2(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    run = make(tmp_path, model, trainer_class=looking(modes))
    seen = {True: set(), False: set()}
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda module, *_: seen[run.inside].add(module.training))
    moved(run)
    assert seen[True] == {False}
    assert True in seen[False]
    assert run.looked[0] == run.looked[1]


def test_no_layer_is_dropped_inside(tmp_path):
    torch.manual_seed(0)
    sizes = {
        f"{part}_{name}": value
        for part in ("encoder", "decoder")
        for name, value in {"layers": 2, "attention_heads": 2, "ffn_dim": 48, "layerdrop": 0.9}.items()
    }
    model = tf.BartForConditionalGeneration(
        tf.BartConfig(
            d_model=32, vocab_size=VOCAB, max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes
        )
    )
    run = make(tmp_path, model, trainer_class=looking(modes))
    calls = {True: {}, False: {}}
    layers = [model, *model.model.encoder.layers, *model.model.decoder.layers]
    for i, module in enumerate(layers):
        module.register_forward_hook(lambda *_, i=i: calls[run.inside].update({i: calls[run.inside].get(i, 0) + 1}))
    moved(run)
    assert len(set(calls[True].values())) == 1
    assert len(calls[True]) == 5
    assert sum(calls[False].get(i, 0) for i in range(1, 5)) < 4 * calls[False][0]


def test_batch_norm_keeps_its_statistics_and_the_function_of_evaluation(tmp_path):
    model, batch = build("resnet", torch.float32)
    rows = [{name: values[i % 3] for name, values in batch.items()} for i in range(18)]

    def look(trainer):
        trainer.model.eval()
        logits = trainer.model(batch["pixel_values"]).logits
        trainer.model.train()
        return [*(buffer.clone() for buffer in trainer.model.buffers()), logits.detach()]

    made = {"train_dataset": rows, "teleport_dataset": rows[:3], "data_collator": tf.default_data_collator}
    run = moved(make(tmp_path, model, teleports("null_space", batch_size=3, num_batches=1), looking(look), made))
    *buffers, logits = run.looked[0]
    *buffers_after, logits_after = run.looked[1]
    assert len(buffers) > 0
    assert all(torch.equal(a, b) for a, b in zip(buffers, buffers_after, strict=True))
    assert torch.allclose(logits, logits_after, atol=1e-4)
    assert not all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))  # training goes on to change them


# --- evaluation and what goes on beside --------------------------------------------------------------------------------------


def test_evaluation_on_start_comes_before_the_first_teleport(tmp_path):
    untouched = make(tmp_path).evaluate()["eval_loss"]
    run = moved(make(tmp_path, config=teleports(steps=[0]), eval_on_start=True, eval_strategy="epoch"))
    first, second, third = run.state.log_history[:3]
    assert first["eval_loss"] == untouched
    assert (second["teleport/method"], third["teleport/method"]) == ("null_space", "basis")


@pytest.mark.parametrize("best", [2, 4], ids=["before_the_teleport", "after_it"])
def test_the_best_model_at_the_end(tmp_path, best):
    class Score(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            metrics["eval_score"] = float(state.global_step == best)

    saved = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 6}
    settings = {**saved, "load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": True}
    run = moved(make(tmp_path, made={"callbacks": [Score()]}, **settings))
    assert run.state.best_global_step == best
    weights = load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors")
    assert all(torch.equal(p, weights[name]) for name, p in run.model.state_dict().items())
    losses = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    assert run.evaluate()["eval_loss"] == losses[best]


class Average(TrainerCallback):
    """An exponential moving average of weights."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        self.expected = None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.average.update_parameters(model)
        self.expected = flat(model) if self.expected is None else self.expected.lerp(flat(model), 0.1)


def test_an_average_of_weights_just_follows_moves_in_the_null_space(tmp_path):
    """A change of basis turns it along: tests/runs/test_averages.py."""
    callback = Average()
    run = moved(make(tmp_path, config=teleports("null_space"), made={"callbacks": [callback]}))
    assert torch.allclose(flat(callback.average.module), callback.expected, atol=1e-6)
    assert not torch.allclose(callback.expected, flat(run.model), atol=1e-3)


def test_a_schedule_free_optimizer_is_rehearsed_in_its_train_mode(tmp_path):
    pytest.importorskip("schedulefree")
    run = make(tmp_path, config=TeleportConfig(method="auto", budget=None), optim="schedule_free_adamw", max_steps=3)
    run.train()
    (report,) = run.teleport_reports
    assert report.method == "null_space"


class TeleportSeq2SeqTrainer(TeleportMixin, Seq2SeqTrainer):
    pass


def answers(trainer):
    """The logits of a teleport batch, without dropout."""
    trainer.model.eval()
    logits = trainer.model(**next(iter(trainer.get_teleport_dataloader(2)))).logits
    trainer.model.train()
    return logits.detach()


@pytest.mark.parametrize("method", METHODS)
def test_seq2seq(tmp_path, method):
    model = build("t5", torch.float32)[0]
    rows = [{name: ids % model.config.vocab_size for name, ids in row.items()} for row in Texts()]
    settings = {"predict_with_generate": True, "generation_max_length": 6, "eval_strategy": "epoch"}
    args = arguments(tmp_path, Seq2SeqTrainingArguments, **settings)
    made = {"train_dataset": rows, "eval_dataset": rows}
    run = moved(make(tmp_path, model, teleports(method), looking(answers, TeleportSeq2SeqTrainer), made, args))
    assert torch.allclose(*run.looked, atol=1e-4)
    assert run.predict(rows).predictions.ndim == 2  # tokens and not logits
    assert sum("eval_loss" in entry for entry in run.state.log_history) == 2


# --- data --------------------------------------------------------------------------------------------------------------------


class Noisy(Texts):
    """Cuts each row at random, with random numbers of its own."""

    def __init__(self):
        super().__init__()
        self.generator = np.random.default_rng(0)

    def __getitem__(self, index):
        length = int(self.generator.integers(4, 7))
        return {name: ids[:length] for name, ids in self.rows[index].items()}


class Shuffled(Stream):
    """Another order each time."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        rows = list(super().__iter__())
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.passes))
        return iter([rows[i] for i in order])


@pytest.mark.parametrize("data", [Noisy, Shuffled])
def test_a_data_set_with_random_numbers_of_its_own_gives_training_the_same(tmp_path, data):
    class Recording(TeleportTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            self.__dict__.setdefault("seen", []).append(inputs["input_ids"].tolist())
            return super().training_step(model, inputs, *args, **kwargs)

    seen = []
    for own in (teleports(steps=[]), teleports()):
        run = make(tmp_path, config=own, trainer_class=Recording, made={"train_dataset": data()}, max_steps=6)
        run.train()
        seen.append(run.seen)
    assert len(run.teleport_reports) == 2
    assert seen[0] == seen[1]


def test_a_training_set_that_is_given_later_is_the_one_to_teleport_on(tmp_path):
    expected = make(tmp_path, made={"train_dataset": Texts(9, seed=2)})
    run = make(tmp_path)
    run.train_dataset = expected.train_dataset
    rows = [next(iter(trainer.get_teleport_dataloader(0)))["input_ids"].tolist() for trainer in (run, expected)]
    assert rows[0] == rows[1]
