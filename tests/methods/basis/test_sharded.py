"""A change of basis of weights that FSDP2 shards, on two gloo processes: against gathered ones, and when something goes wrong."""

import pytest
import torch
import torch.distributed as dist
from torch import optim
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_teleport import TeleportConfig, Teleporter
from hf_teleport.methods.basis import BasisTurn, moments, turn
from hf_teleport.methods.basis.moments import Moments
from hf_teleport.weights.shards import Shards, whole_of
from hf_teleport.weights.snapshot import Snapshot

from ranks import llama, mixtral, run, sharded, tokens
from tiny_models import VOCAB, loss_fn


def uneven(model):
    """With gains and biases of training, so that they have to be folded."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.rand(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def tied(dtype):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": VOCAB}
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True, use_cache=False)).to(dtype)


def gpt2(dtype):
    torch.manual_seed(0)
    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 16, "vocab_size": VOCAB, "tie_word_embeddings": False}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None, use_cache=False)).to(dtype)


ALL_KINDS = ("stream", "value_output", "query_key", "chain", "scaling")

# A model, its precision, the settings, whether an optimizer has its state turned, and the largest relative difference.
CASES = {
    "folded gains": (llama, torch.float64, {}, True, 1e-12),
    "scaling": (llama, torch.float64, {"symmetries": ALL_KINDS}, True, 1e-12),
    "rounded gains": (tied, torch.float64, {"blocking_gains": "round", "max_loss_change": None}, True, 1e-12),
    "biases": (gpt2, torch.float64, {"second_moment": "turn"}, True, 1e-12),
    "experts": (mixtral, torch.float64, {}, False, 1e-12),
    "bf16": (llama, torch.bfloat16, {}, True, 1e-2),
    "norms sharded alone": (llama, torch.float64, {}, True, 1e-12),
}


def made(name):
    make, dtype, *_ = CASES[name]
    model = uneven(make(dtype))
    if name == "norms sharded alone":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for module in model.modules():
            if "Norm" in type(module).__name__:
                fully_shard(module, mesh=mesh)
    return sharded(model, model.transformer.h if make is gpt2 else None)


def stepped(model, rank, size):
    """An optimizer with a state."""
    optimizer = optim.AdamW(model.parameters(), lr=1e-3)
    for batch in tokens(rank, size)[:2]:
        loss_fn(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def everything(model, optimizer=None):
    """All weights, and all that the optimizer keeps for them."""
    kept = [] if optimizer is None else [v for p in model.parameters() for v in optimizer.state[p].values()]
    values = [v.detach() for v in (*model.parameters(), *kept)]
    return torch.cat([(v.full_tensor() if isinstance(v, DTensor) else v).flatten() for v in values]).clone()


def turned(name, rank, size, gathered):
    """The report, all values after the event, the most values that were whole at once, and those in the copy to return to."""
    *_, settings, with_optimizer, _ = CASES[name]
    model, most, copied = made(name), [0], [0]
    optimizer = stepped(model, rank, size) if with_optimizer else None
    gather, copy = Shards._gathered, Snapshot.__init__

    def gathering(self, parts):
        wholes = gather(self, parts)
        most.append(sum(whole.numel() for whole in wholes))
        return wholes

    def copying(self, parameters, state=None):
        copy(self, parameters, state)
        kept = [value for own in self._kept.values() for value in own.values() if isinstance(value, torch.Tensor)]
        copied.append(sum(value.numel() for value in [*(saved for _, saved in self._saved), *kept]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shards, "_gathered", gathering)
        patch.setattr(Snapshot, "__init__", copying)
        if gathered:
            patch.setattr(BasisTurn, "on_shards", staticmethod(lambda config: False))
        config = TeleportConfig(method="basis", num_batches=2, **settings)
        report = Teleporter(model, config, optimizer=optimizer).teleport(tokens(rank, size)[:2], loss_fn)
    values = everything(model, optimizer)
    return {
        "report": report,
        "values": values,
        "most": max(most),
        "copied": max(copied),
        "size": sum(map(numel, model.parameters())),
    }


def numel(parameter):
    return parameter.shape.numel()


# What fails in process 1 in the midst of an event, at which call, and with what.
FAULTS = {
    "a turn": (turn, "turn_axis", 9, RuntimeError("no such kernel")),
    "memory in a turn": (turn, "turn_axis", 9, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")),
    "moments": (moments, "slices", 3, RuntimeError("no such kernel")),
    "review": (BasisTurn, "_off", 1, RuntimeError("no such kernel")),
}


def faulty(name, rank, size):
    """What comes of an event with a fault, whether it left a trace, and what comes of the next event."""
    where, function, at, error = FAULTS[name]
    model = sharded(uneven(llama(torch.float32)))
    optimizer = stepped(model, rank, size)
    before, calls, real = everything(model, optimizer), [], getattr(where, function)

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == at and rank == 1:
            raise error
        return real(*args, **kwargs)

    teleporter = Teleporter(model, TeleportConfig(method="basis"), optimizer=optimizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, function, failing)
        try:
            outcome = teleporter.teleport(tokens(rank, size)[:1], loss_fn).steps
        except RuntimeError as problem:
            outcome = str(problem)
    unchanged = torch.equal(everything(model, optimizer), before)
    return outcome, unchanged, teleporter.teleport(tokens(rank, size)[:1], loss_fn).steps, everything(model, optimizer)


def left_behind(rank, size):
    """What comes of an event that forgets to turn the embeddings and the head."""
    model = sharded(uneven(llama(torch.float64)))
    optimizer = stepped(model, rank, size)
    before, real = everything(model, optimizer), turn._turn

    def all_but_those(part, *args, **kwargs):
        if len(whole_of(part.parameter)) != VOCAB:
            real(part, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turn, "_turn", all_but_those)
        config = TeleportConfig(method="basis", max_loss_change=None)
        report = Teleporter(model, config, optimizer=optimizer).teleport(tokens(rank, size)[:1], loss_fn)
    return report.stopped_because, torch.equal(everything(model, optimizer), before)


def looked(rank, size):
    """Second moments of sharded gradients, and of the same gradients whole."""
    found = {}
    for name in ("folded gains", "biases"):
        model = made(name)
        optimizer = optim.AdamW(model.parameters())
        teleporter = Teleporter(model, TeleportConfig(method="basis", symmetries=ALL_KINDS), optimizer=optimizer)
        teleporter.check(tokens(rank, size)[0], loss_fn)
        whole = Moments(teleporter.tracker.moments.symmetries, decay=teleporter.tracker.moments.decay)
        for step, batch in enumerate(tokens(rank, size)):
            model.zero_grad()
            loss_fn(model, batch).backward()
            teleporter.tracker.look(5 * step)
            whole.look({p: p.grad.full_tensor() for p in model.parameters()})
        pairs = [(teleporter.tracker.values[s], whole.values[s]) for s in whole.symmetries]
        found[name] = [(s.kind, own, gathered) for s, (own, gathered) in zip(whole.symmetries, pairs, strict=True)]
    return found


def scenes(rank, size):
    return {
        "cases": {(name, way): turned(name, rank, size, way) for name in CASES for way in (False, True)},
        "faults": {name: faulty(name, rank, size) for name in FAULTS},
        "left behind": left_behind(rank, size),
        "looked": looked(rank, size),
    }


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda path, load=torch.load: load(path, weights_only=False))  # reports too
        return run(scenes, 2, tmp_path_factory.mktemp("sharded"))


@pytest.mark.parametrize("name", CASES)
def test_shards_end_where_gathered_weights_do(both, name):
    first, second = (each["cases"][name, False] for each in both)
    gathered = both[0]["cases"][name, True]
    assert torch.equal(first["values"], second["values"])
    assert first["report"].steps == gathered["report"].steps == 1
    assert (first["values"] - gathered["values"]).norm() <= CASES[name][-1] * gathered["values"].norm()
    assert [v.reason for v in first["report"].layers] == [v.reason for v in gathered["report"].layers]
    found = [(s.kind, s.name, s.blocks, s.size, s.reason) for s in first["report"].symmetries]
    assert found == [(s.kind, s.name, s.blocks, s.size, s.reason) for s in gathered["report"].symmetries]
    assert any(kind == "stream" and not reason for kind, *_, reason in found)


@pytest.mark.parametrize("name", CASES)
def test_no_process_holds_the_whole_model(both, name):
    shards, gathered = (both[0]["cases"][name, way] for way in (False, True))
    assert gathered["most"] == 0
    assert 0 < shards["most"] < 0.5 * shards["size"], "a layer at most, and both layers are half of it or less"
    assert shards["copied"] <= 0.55 * gathered["copied"], "its own shards, to return to"


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_midst_of_an_event_is_everybodys(both, name):
    (mine, unchanged, again, values), (theirs, theirs_unchanged, _, their_values) = (each["faults"][name] for each in both)
    assert torch.equal(values, their_values)
    assert again == 1, "the next event goes well"
    if "memory" in name:
        assert mine == theirs == 1, "the event is made again with smaller batches"
        assert not unchanged
    else:
        assert theirs == "no such kernel"
        assert "another process failed" in mine
        assert unchanged
        assert theirs_unchanged


def test_what_is_no_symmetry_is_undone_bit_for_bit(both):
    assert {each["left behind"] for each in both} == {("not_a_symmetry", True)}


@pytest.mark.parametrize("name", ["folded gains", "biases"])
def test_sums_over_shards_are_the_moments_of_whole_gradients(both, name):
    for each in both:
        kinds = set()
        for kind, own, whole in each["looked"][name]:
            kinds.add(kind)
            assert (own - whole).norm() <= 1e-12 * whole.norm(), kind
        assert kinds >= {"stream", "value_output"}
