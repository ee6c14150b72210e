"""Optimizers of experiments: combined ones, those by name, and learning rates by groups of parameters."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Muon
from transformers import GPT2Config, GPT2LMHeadModel, get_cosine_schedule_with_warmup

from hf_teleport.lab.arguments import ExperimentArguments
from hf_teleport.lab.optimizers import CombinedOptimizer, hidden_matrices, make_optimizer, outer_parameters, parameter_groups

from tiny_runs import llama


def arguments(tmp_path, **settings):
    return ExperimentArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **settings)


def names(model, parameters):
    wanted = {id(parameter) for parameter in parameters}
    return {name for name, parameter in model.named_parameters() if id(parameter) in wanted}


def rates(model, optimizer):
    """The learning rate and weight decay of each parameter by its name."""
    found = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    return {name: found[id(p)] for name, p in model.named_parameters()}


# --- several behind one -----------------------------------------------------------------------------------------------------


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    x, y = torch.randn(32, 6).double(), torch.randn(32, 4).double()
    return model, lambda: (model(x) - y).square().mean()


def parts(model):
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    return Muon(matrices, lr=0.02, weight_decay=0.1), AdamW(vectors, lr=0.01, weight_decay=0.0)


def train(loss, optimizers, schedulers, steps):
    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss().backward()
        for either in (*optimizers, *schedulers):
            either.step()


def schedule(optimizer):
    return get_cosine_schedule_with_warmup(optimizer, 2, 8)


def test_combined_it_does_what_its_parts_do_alone():
    apart, loss_apart = problem()
    optimizers = parts(apart)
    train(loss_apart, optimizers, [schedule(optimizer) for optimizer in optimizers], 6)
    model, loss = problem()
    optimizer = CombinedOptimizer(*parts(model))
    train(loss, [optimizer], [schedule(optimizer)], 6)
    for one, other in zip(model.parameters(), apart.parameters(), strict=True):
        assert torch.equal(one, other)
    assert optimizer.step(lambda: 3.0) == 3.0


def test_combined_it_goes_on_from_its_state():
    whole, loss = problem()
    optimizer = CombinedOptimizer(*parts(whole))
    train(loss, [optimizer], [], 3)
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), whole.state_dict()], file)
    train(loss, [optimizer], [], 3)

    resumed, loss = problem()
    second = CombinedOptimizer(*parts(resumed))
    file.seek(0)
    state, weights = torch.load(file)
    resumed.load_state_dict(weights)
    second.load_state_dict(state)
    train(loss, [second], [], 3)
    for one, other in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other)
    # What is kept is the parts' own, after loading too.
    assert {id(p) for p in second.state} == {id(p) for p in resumed.parameters()}
    assert all(second.state[p] is part.state[p] for part in second.parts for g in part.param_groups for p in g["params"])
    assert [id(g) for g in second.param_groups] == [id(g) for part in second.parts for g in part.param_groups]


def test_a_copy_leaves_the_original_as_it_is():
    model, loss = problem()
    optimizer = CombinedOptimizer(*parts(model))
    train(loss, [optimizer], [], 2)
    both = copy.deepcopy([model, optimizer])
    before = copy.deepcopy(model.state_dict())
    for p, q in zip(both[0].parameters(), model.parameters(), strict=True):
        p.grad = q.grad.clone()
    both[1].step()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    optimizer.step()
    for one, other in zip(model.parameters(), both[0].parameters(), strict=True):
        assert torch.equal(one, other)


def test_parts_that_do_not_fit_are_refused():
    model, _ = problem()
    muon, adamw = parts(model)
    optimizer = CombinedOptimizer(muon, adamw)
    with pytest.raises(ValueError, match="add it to an optimizer before it is combined"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    with pytest.raises(ValueError, match="1 groups of parameters are not allowed; allowed: 2"):
        optimizer.load_state_dict(adamw.state_dict())
    with pytest.raises(ValueError, match="more than one parameter group"):
        CombinedOptimizer(muon, SGD(model.parameters(), lr=1.0))
    with pytest.raises(ValueError, match="one optimizer or more"):
        CombinedOptimizer()


# --- groups of parameters ---------------------------------------------------------------------------------------------------


def test_outer_and_hidden_parameters():
    model = llama()
    assert names(model, outer_parameters(model)) == {"model.embed_tokens.weight", "lm_head.weight"}
    hidden = names(model, hidden_matrices(model))
    assert all(name.endswith("_proj.weight") for name in hidden)
    assert len(hidden) == 7 * model.config.num_hidden_layers
    # Tied, with layers that are no nn.Linear, and with two embeddings.
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16, n_positions=8))
    assert names(model, outer_parameters(model)) == {"transformer.wte.weight", "transformer.wpe.weight"}
    assert names(model, hidden_matrices(model)) == {
        f"transformer.h.0.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }


def test_a_classifiers_head_is_known_by_its_name():
    from transformers import ViTConfig, ViTForImageClassification

    model = ViTForImageClassification(
        ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4)
    )
    assert names(model, outer_parameters(model)) == {"classifier.weight", "classifier.bias"}


def test_rates_by_groups(tmp_path):
    model = llama()
    settings = {"learning_rate": 1e-3, "embedding_learning_rate": 1e-2, "weight_decay": 0.1}
    groups = parameter_groups(model, arguments(tmp_path, **settings, parameter_learning_rates={"lm_head": 5e-2, "norm": "3e-3"}))
    found = {name: (g["lr"], g["weight_decay"]) for g in groups for name in names(model, g["params"])}
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert found["model.embed_tokens.weight"] == (1e-2, 0.1)
    assert found["lm_head.weight"] == (5e-2, 0.1)
    assert found["model.norm.weight"] == (3e-3, 0.0)
    assert found["model.layers.0.mlp.up_proj.weight"] == (1e-3, 0.1)
    # Trainer logs the first.
    assert groups[0]["lr"] == 1e-3
    model.lm_head.requires_grad_(False)
    groups = parameter_groups(model, arguments(tmp_path, **settings))
    assert "lm_head.weight" not in {name for g in groups for name in names(model, g["params"])}
    with pytest.raises(ValueError, match=r"parameter_learning_rates has 'lm_head', which is in no parameter's name"):
        parameter_groups(model, arguments(tmp_path, parameter_learning_rates={"lm_head": 1.0}))


# --- by name ----------------------------------------------------------------------------------------------------------------


def test_trainers_own_with_another_rate_for_embeddings(tmp_path):
    model = llama()
    optimizer = make_optimizer(model, arguments(tmp_path, optim="adamw_torch", adam_beta2=0.95, embedding_learning_rate=0.1))
    assert type(optimizer) is AdamW
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    assert rates(model, optimizer)["lm_head.weight"] == (0.1, 0.0)
    optimizer = make_optimizer(
        model, arguments(tmp_path, optim="sgd", optim_args="momentum=0.9", parameter_learning_rates={"mlp": 1.0})
    )
    assert (type(optimizer), optimizer.param_groups[0]["momentum"]) == (SGD, 0.9)


def test_muon_for_hidden_matrices_and_adamw_for_the_rest(tmp_path):
    model = llama()
    settings = {"learning_rate": 2e-2, "embedding_learning_rate": 1e-2, "weight_decay": 0.1, "adam_beta2": 0.95}
    settings |= {"parameter_learning_rates": {"norm": 3e-3}, "optimizer_settings": {"momentum": 0.9}}
    optimizer = make_optimizer(model, arguments(tmp_path, optimizer="muon+adamw", **settings))
    assert isinstance(optimizer, CombinedOptimizer)
    by_part = [part.param_groups for part in optimizer.parts]
    assert {name for g in by_part[0] for name in names(model, g["params"])} == names(model, hidden_matrices(model))
    assert [(g["lr"], g["momentum"], g["adjust_lr_fn"]) for g in by_part[0]] == [(2e-2, 0.9, "match_rms_adamw")]
    assert {(g["lr"], g["weight_decay"], g["betas"]) for g in by_part[1]} == {
        (1e-2, 0.1, (0.9, 0.95)),
        (3e-3, 0.0, (0.9, 0.95)),
    }
    with pytest.raises(ValueError, match=r"'muon\+adamw' is not allowed: the model has no hidden matrices"):
        make_optimizer(nn.LayerNorm(3), arguments(tmp_path, optimizer="muon+adamw"))


def test_soap_keeps_its_own_betas_but_for_those_that_are_given(tmp_path):
    model = llama()
    soap = {"optimizer": "SOAP", "weight_decay": 0.01, "optimizer_settings": {"precondition_frequency": 3}}
    optimizer = make_optimizer(model, arguments(tmp_path, **soap))
    assert type(optimizer).__name__ == "SOAP"
    assert {(g["precondition_frequency"], g["betas"], g["lr"]) for g in optimizer.param_groups} == {(3, (0.95, 0.95), 5e-5)}
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.01, 0.0}
    optimizer = make_optimizer(model, arguments(tmp_path, **soap, adam_beta2=0.99, embedding_learning_rate=1e-2))
    assert optimizer.param_groups[0]["betas"] == (0.95, 0.99)
    assert rates(model, optimizer)["model.embed_tokens.weight"] == (1e-2, 0.01)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "SAOP"}, r"optimizer = 'SAOP' is not allowed; .* the nearest is 'SOAP'"),
        ({"optimizer": "Adagrad", "adam_beta2": 0.9}, r"adam_beta2 is not allowed with optimizer = 'Adagrad'"),
        (
            {"optimizer": "Adagrad", "optimizer_settings": {"eta": 1}},
            r"optimizer_settings has 'eta', which 'Adagrad' does not take",
        ),
        ({"optimizer_settings": {"momentum": 1}}, r"not allowed without `optimizer`; for `optim` give `optim_args`"),
        ({"embedding_learning_rate": -1.0}, r"embedding_learning_rate = -1.0 is not allowed; allowed: a positive number"),
        ({"parameter_learning_rates": {"norm": "big"}}, r"parameter_learning_rates\['norm'\] = 'big' is not allowed"),
        ({"parameter_learning_rates": 3}, r"parameter_learning_rates = 3 is not allowed; allowed: a mapping"),
    ],
)
def test_settings_that_are_wrong(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **settings)


def test_an_optimizer_that_does_not_suit_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"'LBFGS' .* is not allowed: LBFGS doesn't support per-parameter options"):
        make_optimizer(llama(), arguments(tmp_path, optimizer="LBFGS"))
