"""Frozen weights that turn in memory: adapters fit the base that was loaded, and it is put back bit for bit."""

import peft
import pytest
import torch
import transformers as tf
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from transformers import TrainerCallback

from hf_teleport import TeleportConfig, Teleporter, TeleportTrainer
from hf_teleport.methods.basis.way import Way
from hf_teleport.training.plan import TRACKED

from faulty import failing, out_of_memory
from tiny_runs import Texts, arguments, llama, make, pad

ADAPTERS = {
    "lora": {"target_modules": "all-linear"},
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "ends": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},  # PEFT saves both ends with the adapter
    "dora": {"target_modules": ["q_proj", "v_proj"], "use_dora": True},  # its norms take the base's weights row by row
}


def batch():
    return pad([Texts(64)[i] for i in range(8)])


def loss_fn(model, batch):
    return model(**batch).loss


def logits(model):
    with torch.no_grad():
        return model.eval()(**batch()).logits


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def base(request, tmp_path):
    """A folder with a saved model whose gains are uneven."""
    return saved(tmp_path / "base", tie_word_embeddings=request.param)


def saved(folder, **settings):
    model = llama(**settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.rand_like(parameter))
    model.save_pretrained(folder)
    return folder


def loaded(folder):
    return tf.LlamaForCausalLM.from_pretrained(folder)


def adapted(folder, kind="lora", **settings):
    torch.manual_seed(0)
    return peft.get_peft_model(loaded(folder), peft.LoraConfig(**{"r": 4, **ADAPTERS[kind], **settings}))


def turning(**settings):
    return TeleportConfig(**{"method": "basis", "steps": [2, 4], "track_every": 1, "frozen_weights": "turn", **settings})


def run(folder, model, config=None, callbacks=(), **settings):
    given = {"max_steps": 8, "learning_rate": 1e-2, "save_strategy": "no", **settings}
    made = {"train_dataset": Texts(64), "eval_dataset": Texts(9, seed=1), "callbacks": list(callbacks)}
    return make(folder, model, config or turning(), made=made, **given)


def copies(model, trained):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad is trained}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def kinds(report):
    return {symmetry.kind for symmetry in report.symmetries if not symmetry.reason}


class Watch(TrainerCallback):
    """The base at the end of each step, and what the model computes."""

    def __init__(self):
        self.base, self.logits = {}, {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.base[state.global_step] = copies(model, trained=False)
        self.logits[state.global_step] = logits(model)
        model.train()


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_of_a_turned_base_fits_the_base_that_was_loaded(base, tmp_path, kind):
    model = adapted(base, kind)
    before, watch = copies(model, trained=False), Watch()
    trainer = run(tmp_path / "out", model, callbacks=[watch], save_strategy="steps", save_steps=3)
    trainer.train()
    for report in trainer.teleport_reports:
        assert report.stopped_because == "steps_done"
        assert ("stream" in kinds(report)) == (kind != "dora")
    moved = [not torch.allclose(values, before.get(name, values), atol=1e-2) for name, values in watch.base[8].items()]
    assert any(moved) == (kind != "dora")
    assert same(copies(model, trained=False), before)
    head, embedding = model.get_base_model().lm_head.weight, model.get_base_model().model.embed_tokens.weight
    assert (head is embedding) == model.config.tie_word_embeddings
    trainer.save_model()
    torch.testing.assert_close(logits(model), watch.logits[8], atol=1e-5, rtol=1e-5)
    for folder, step in ((tmp_path / "out", 8), (tmp_path / "out" / "checkpoint-3", 3), (tmp_path / "out" / "checkpoint-6", 6)):
        plain = peft.PeftModel.from_pretrained(loaded(base), folder)
        torch.testing.assert_close(logits(plain), watch.logits[step], atol=1e-5, rtol=1e-5)
    assert not (tmp_path / "out" / TRACKED).exists()


def test_memory_that_runs_out_as_a_turn_of_the_base_is_kept(base, monkeypatch):
    """The event is tried again with smaller batches. Base and adapters must have turned alike, and once."""
    model = adapted(base)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    before = logits(model)
    teleporter = Teleporter(model, turning(basis="random", steps=None), optimizer=torch.optim.AdamW(model.parameters()))
    calls = failing(monkeypatch, (Way, "turned_frozen", 1), out_of_memory())
    assert teleporter.teleport([batch()], loss_fn).steps
    assert next(calls) > 2
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)
    assert not any(report.reason for report in teleporter.turn_back())
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)


def scores(model):
    inputs = {name: tensor for name, tensor in batch().items() if name != "labels"}
    with torch.no_grad():
        return model.eval()(**inputs).logits


def of_classes(rows):
    return {**pad(rows), "labels": torch.tensor([int(row["input_ids"][0]) % 2 for row in rows])}


def test_a_classifier_that_is_trained_beside_adapters_lets_the_stream_turn(base, tmp_path):
    """PEFT keeps the frozen original of the classifier, which no forward uses while adapters are on."""

    class WithoutAdapters(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            with model.disable_adapter():
                self.scores = scores(model)
            model.train()

    torch.manual_seed(0)
    fresh = tf.LlamaForSequenceClassification.from_pretrained(base, num_labels=2, pad_token_id=0)
    fresh.save_pretrained(tmp_path / "fresh")
    before, model = (
        scores(fresh),
        peft.get_peft_model(fresh, peft.LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS")),
    )
    frozen, watch = copies(model, trained=False), WithoutAdapters()
    trainer = TeleportTrainer(
        *(model, arguments(tmp_path / "out", max_steps=8, learning_rate=1e-2)),
        train_dataset=Texts(64),
        data_collator=of_classes,
        callbacks=[watch],
        teleport_config=turning(),
    )
    trainer.train()
    for report in trainer.teleport_reports:
        assert report.stopped_because == "steps_done"
        assert "stream" in kinds(report)
    torch.testing.assert_close(watch.scores, before, atol=1e-5, rtol=1e-5)
    assert same(copies(model, trained=False), frozen)
    trainer.save_model()
    plain = peft.PeftModel.from_pretrained(
        tf.LlamaForSequenceClassification.from_pretrained(tmp_path / "fresh"), tmp_path / "out"
    )
    torch.testing.assert_close(scores(plain), scores(model), atol=1e-5, rtol=1e-5)


def test_a_weight_that_is_unfrozen_in_mid_run_keeps_what_it_learns(base, tmp_path):
    class Unfreeze(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            if state.global_step == 5:
                weight = model.get_base_model().model.layers[0].mlp.down_proj.base_layer.weight
                optimizer.param_groups[0]["params"].append(weight.requires_grad_())

        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.logits = logits(model)
            model.train()

    model, watch = adapted(base), Unfreeze()
    frozen = copies(model, trained=False)
    run(tmp_path / "out", model, callbacks=[watch], lr_scheduler_type="constant").train()
    torch.testing.assert_close(logits(model), watch.logits, atol=1e-5, rtol=1e-5)
    moved = {name for name, p in model.named_parameters() if name in frozen and not torch.equal(p, frozen[name])}
    assert moved == {"base_model.model.model.layers.0.mlp.down_proj.base_layer.weight"}


def test_checkpoints_of_a_frozen_adapter_beside_a_trained_one_fit_the_base(base, tmp_path):
    model = adapted(base)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_("other" in name)
            with torch.no_grad():
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.base_model.set_adapter(["default", "other"], inference_mode=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".other" in name)
    watch = Watch()
    run(tmp_path / "out", model, callbacks=[watch], save_strategy="steps", save_steps=6).train()
    folder = tmp_path / "out" / "checkpoint-6"
    plain = peft.PeftModel.from_pretrained(loaded(base), folder)
    plain.load_adapter(folder / "other", "other")
    plain.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(logits(plain), watch.logits[6], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("frozen_weights", ["turn", "stay"])
def test_an_optimizer_with_an_empty_group_is_reset(base, tmp_path, frozen_weights):
    """Trainer makes a group of the weights without decay, and adapters have none."""
    trainer = run(tmp_path / "out", adapted(base), turning(frozen_weights=frozen_weights, optimizer_state="reset"))
    trainer.train()
    assert all(report.stopped_because == "steps_done" for report in trainer.teleport_reports)


class LongestSteps(TrainerCallback):
    """The longest step of any adapter's number, by step."""

    def __init__(self):
        self.before, self.longest = {}, []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.before = copies(model, trained=True)

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        after = copies(model, trained=True)
        self.longest.append(max(float((after[name] - p).abs().max()) for name, p in self.before.items()))


@pytest.mark.parametrize("second_moment", ["factors", "measure"])
def test_few_gradients_of_low_rank_make_no_long_steps(tmp_path, second_moment):
    """Two looks at adapters of rank 4 show nothing of most of the stream."""
    steps = LongestSteps()
    config = turning(steps=[4], track_every=2, second_moment=second_moment)
    model = adapted(saved(tmp_path / "base"), "attention")
    run(tmp_path / "out", model, config, [steps], learning_rate=1e-3, lr_scheduler_type="constant").train()
    assert max(steps.longest) < 6e-3


def test_a_run_that_is_killed_and_resumed_is_the_same_bit_for_bit(base, tmp_path):
    def train(folder, checkpoint=None):
        watch = Watch()
        trainer = run(folder, adapted(base), callbacks=[watch], save_strategy="steps", save_steps=3)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer, watch

    whole, seen = train(tmp_path / "whole")
    for step in (3, 6):
        resumed, watch = train(tmp_path / "resumed", str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert same(copies(resumed.model, trained=True), copies(whole.model, trained=True)), step
        assert same(watch.base[8], seen.base[8])
        assert torch.equal(watch.logits[8], seen.logits[8])


def test_the_best_checkpoints_adapter_fits_too(base, tmp_path):
    class First(TeleportTrainer):
        def _determine_best_metric(self, metrics, trial):
            return super()._determine_best_metric({**metrics, "eval_loss": float(self.state.global_step)}, trial)

    model, watch = adapted(base), Watch()
    before = copies(model, trained=False)
    settings = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 3, "eval_steps": 3}
    trainer = First(
        model,
        arguments(tmp_path / "out", max_steps=8, load_best_model_at_end=True, **settings),
        train_dataset=Texts(64),
        eval_dataset=Texts(9, seed=1),
        data_collator=pad,
        teleport_config=turning(),
        callbacks=[watch],
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-3")
    assert same(copies(model, trained=False), before)
    torch.testing.assert_close(logits(model), watch.logits[3], atol=1e-5, rtol=1e-5)


def test_by_default_what_is_frozen_never_moves(base, tmp_path):
    model, watch = adapted(base), Watch()
    before = copies(model, trained=False)
    trainer = run(tmp_path, model, turning(frozen_weights="stay"), callbacks=[watch])
    trainer.train()
    assert kinds(trainer.teleport_reports[-1]) == {"chain"}
    assert all(same(seen, before) for seen in watch.base.values())


@pytest.mark.parametrize("resumed", [False, True])
def test_a_full_fine_tuning_with_frozen_embeddings_and_a_frozen_layer(tmp_path, resumed):
    folder = saved(tmp_path / "base")

    def model():
        made = loaded(folder)
        for part in (made.model.embed_tokens, made.model.layers[0], made.model.layers[1].input_layernorm, made.model.norm):
            part.requires_grad_(False)
        made.model.layers[1].post_attention_layernorm.requires_grad_(False)
        return made

    trained, watch = model(), Watch()
    before = copies(trained, trained=False)
    trainer = run(tmp_path / "out", trained, callbacks=[watch], save_strategy="steps", save_steps=3)
    trainer.train()
    assert "stream" in kinds(trainer.teleport_reports[-1])
    if resumed:
        trained = model()
        again = run(tmp_path / "again", trained)
        again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
        after = copies(trained, trained=False)
        assert all(torch.allclose(after[name], before[name], atol=1e-6) for name in before)
    else:
        assert same(copies(trained, trained=False), before)
    torch.testing.assert_close(logits(trained), watch.logits[8], atol=2e-5, rtol=1e-4)


def test_a_trained_gain_does_not_go_into_a_frozen_weight(tmp_path):
    model = loaded(saved(tmp_path / "base"))
    model.model.layers[0].requires_grad_(False)
    model.model.layers[0].input_layernorm.requires_grad_(True)
    report = Teleporter(model, turning(steps=None)).teleport([batch()], loss_fn)
    (reason,) = {symmetry.reason for symmetry in report.symmetries if symmetry.kind == "stream"}
    assert reason == (
        "model.layers.0.input_layernorm is trained, and would have to be folded into model.layers.0.self_attn.q_proj, "
        "which is frozen: freeze both, or train both"
    )


ROTATION = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0))).Q


@pytest.mark.parametrize(
    ("reads", "writes", "exact"),
    [(ROTATION, torch.eye(8), True), (torch.eye(8), ROTATION, False), (torch.diag(torch.arange(1.0, 9)), torch.eye(8), False)],
    ids=["inputs", "outputs", "gain"],
)
@pytest.mark.parametrize("dora", [False, True])
def test_dora_leaves_rotations_of_its_inputs_free_and_nothing_else(dora, reads, writes, exact):
    """LoRA leaves all of them free. Why DoRA's base stays: docs/basis.md."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["0"], use_dora=dora, init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8, bias=False)), config)
    layer, x = model.base_model.model[0], torch.randn(5, 8)
    before = model(x) @ writes.T
    with torch.no_grad():
        layer.base_layer.weight.copy_(writes @ layer.base_layer.weight @ reads)
        layer.lora_A["default"].weight.copy_(layer.lora_A["default"].weight @ reads)
        layer.lora_B["default"].weight.copy_(writes @ layer.lora_B["default"].weight)
    after = model(x @ torch.linalg.inv(reads).T)
    assert torch.allclose(after, before, atol=1e-4) == (exact or not dora)


def test_a_base_without_embeddings_turns():
    """Transformers raises NotImplementedError when it is asked for them."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "conv_dim": (8, 8)}
    config = tf.Wav2Vec2Config(
        **sizes, conv_kernel=(4, 4), conv_stride=(4, 4), num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2
    )
    model = peft.get_peft_model(tf.Wav2Vec2Model(config), peft.LoraConfig(r=2, target_modules="all-linear")).eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    def mean_square(model, batch):
        return model(batch).last_hidden_state.diff(dim=1).square().mean()

    report = Teleporter(model, turning(), optimizer=optimizer).teleport([torch.randn(2, 400)], mean_square)
    assert report.stopped_because == "steps_done"
    assert "value_output" in kinds(report)


class Quantized(nn.Parameter):
    """A weight as libraries of quantization keep it: a parameter of a class of their own."""


def test_a_quantized_base_stays_and_says_why(tmp_path):
    model = adapted(saved(tmp_path / "base"))
    for module in model.get_base_model().modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            module._parameters["weight"] = Quantized(module.weight.data, requires_grad=False)
    before = copies(model, trained=False)
    teleporter = Teleporter(model, turning(steps=None))
    report = teleporter.teleport([batch()], loss_fn)
    assert kinds(report) == {"chain"}
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert reasons["base_model.model.model.layers.0.self_attn.q_proj.base_layer"].startswith("frozen and quantized: ")
    assert same(copies(model, trained=False), before)


def test_bfloat16_bases_come_back_bit_for_bit(base, tmp_path):
    torch.manual_seed(0)
    model = peft.get_peft_model(loaded(base).to(torch.bfloat16), peft.LoraConfig(r=4, target_modules="all-linear"))
    before, watch = copies(model, trained=False), Watch()
    trainer = run(tmp_path, model, callbacks=[watch])
    trainer.train()
    assert "stream" in kinds(trainer.teleport_reports[-1])
    assert not same(watch.base[8], before)
    assert same(copies(model, trained=False), before)


# --- merging --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A base, and two adapters at random values, each saved untouched and saved by a run that turned it with its base."""
    tmp_path = tmp_path_factory.mktemp("two")
    folder = saved(tmp_path / "base")
    for name in ("a", "b"):
        torch.manual_seed(ord(name))
        config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        model = peft.get_peft_model(loaded(folder), config)
        model.save_pretrained(tmp_path / "plain" / name)

        class Save(TrainerCallback):
            def on_step_end(self, args, state, control, name=name, **kwargs):
                if state.global_step == 6:  # in the midst of the run, in turned coordinates
                    self.trainer.save_model(str(tmp_path / "turned" / name))

        save = Save()
        save.trainer = run(tmp_path / "out", model, turning(basis="random"), [save], learning_rate=0.0)
        save.trainer.train()
        assert "stream" in kinds(save.trainer.teleport_reports[-1])
    return folder, tmp_path / "plain", tmp_path / "turned"


def with_both(base, folder):
    model = peft.PeftModel.from_pretrained(loaded(base), folder / "a", adapter_name="a")
    model.load_adapter(folder / "b", adapter_name="b")
    return model


@pytest.mark.parametrize("how", ["merge", "linear", "cat", "svd", "ties", "hotswap"])
def test_peft_merges_adapters_of_turned_bases_as_untouched_ones(two, how):
    base, *folders = two
    found = []
    for folder in folders:
        model = with_both(base, folder)
        if how == "merge":
            model = model.merge_and_unload(adapter_names=["a", "b"])
        elif how == "hotswap":
            hotswap_adapter(model, folder / "b", adapter_name="a")
        else:
            more = {"density": 0.9} if how == "ties" else {}
            model.add_weighted_adapter(["a", "b"], [0.7, 0.4], "both", combination_type=how, **more)
            model.set_adapter("both")
        found.append(logits(model))
    torch.testing.assert_close(found[1], found[0], atol=2e-5, rtol=1e-4)
    assert not torch.allclose(found[0], logits(loaded(base)), atol=1e-2)
