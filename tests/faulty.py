"""What can go wrong in a teleport, models and runs in which it does, and what must hold of them whatever happened."""

import random
from functools import cache
from itertools import count

import numpy as np
import torch
from torch import nn, optim
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

from hf_teleport import TeleportConfig, Teleporter, TeleportTrainer, TeleportTrainingArguments
from hf_teleport.lab.data import ImageTensors
from hf_teleport.lab.models import MLPConfig, MLPForImageClassification
from hf_teleport.layers.point import loss_at
from hf_teleport.weights.isolation import preserved_rng

from tiny_models import VOCAB
from tiny_models import loss_fn as language_loss

METHODS = ["null_space", "basis"]


class Net(nn.Module):
    """Dropout, and buffers that a forward in training changes."""

    def __init__(self):
        super().__init__()
        hidden = nn.Linear(48, 64), nn.BatchNorm1d(64), nn.Tanh(), nn.Dropout(0.5), nn.Linear(64, 64), nn.Tanh()
        self.layers = nn.Sequential(*hidden, nn.Linear(64, 4))

    def forward(self, x, labels):
        return nn.functional.cross_entropy(self.layers(x), labels)


def net_loss(model, batch):
    return model(**batch)


def rows(size, seed):
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(size, 48, generator=generator), "labels": torch.randint(0, 4, (size,), generator=generator)}


def texts(size, seed):
    ids = torch.randint(0, VOCAB, (size, 6), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def llama():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": VOCAB}
    return LlamaForCausalLM(LlamaConfig(**sizes, attention_dropout=0.1, use_cache=False))


class Scene:
    """A model, an optimizer that has trained it, batches to teleport on, and one to hold back."""

    def __init__(self, method="null_space", dtype=torch.float32, **settings):
        torch.manual_seed(0)
        self.loss, make, draw = (language_loss, llama, texts) if method == "basis" else (net_loss, Net, rows)
        self.model = make().to(dtype)
        self.batches, self.held_back = [draw(8, seed) for seed in (1, 2)], draw(8, 3)
        if dtype != torch.float32 and method != "basis":
            for batch in (*self.batches, self.held_back):
                batch["x"] = batch["x"].to(dtype)
        self.config = TeleportConfig(**{"steps_per_batch": 2, "max_growth": None, **settings}).for_method(method)
        self.optimizer = optim.AdamW(self.model.parameters(), lr=1e-3, eps=1e-4)  # float16 has no 1e-8
        self.train()
        self.train()
        self.loss(self.model, self.batches[0]).backward()  # gradients that are none of a teleport's business
        self.model.get_submodule("layers" if method != "basis" else "model.layers").eval()
        self.remember()

    def train(self):
        self.optimizer.zero_grad()
        self.loss(self.model, self.batches[0]).backward()
        self.optimizer.step()

    def remember(self):
        self.before, self.around, self.losses = self.state(), self.surroundings(), self.evaluated()

    def state(self):
        """All that an event may change."""
        kept = {
            (i, name): value for i, p in enumerate(self.model.parameters()) for name, value in self.optimizer.state[p].items()
        }
        return {name: value.detach().clone() for name, value in (*self.model.named_parameters(), *kept.items())}

    def surroundings(self):
        """All that it may not."""
        parameters = list(self.model.parameters())
        return {
            "modes": [module.training for module in self.model.modules()],
            "buffers": [buffer.tolist() for buffer in self.model.buffers()],
            "gradients": [None if p.grad is None else p.grad.tolist() for p in parameters],
            "kinds": [(p.requires_grad, p.dtype, id(p), p.data_ptr()) for p in parameters],
            "random": (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),
            "torch": (torch.is_grad_enabled(), torch._C._len_torch_function_stack(), torch.get_float32_matmul_precision()),
        }

    def evaluated(self):
        """The mean loss over the batches, and that of the one held back, without the teleporter."""
        modes = [module.training for module in self.model.modules()]
        with preserved_rng():
            losses = [loss_at(self.model, self.loss, batch, seed=0) for batch in (*self.batches, self.held_back)]
        for module, mode in zip(self.model.modules(), modes, strict=True):
            module.training = mode
        return sum(losses[:-1]) / len(losses[:-1]), losses[-1]

    def teleport(self, loss=None, batches=None, held_back=True):
        held_back = self.held_back if held_back is True else held_back
        teleporter = Teleporter(self.model, self.config, optimizer=self.optimizer)
        return teleporter.teleport(batches or self.batches, loss or self.loss, held_back)

    def untouched(self):
        return same(self.state(), self.before)

    def assert_sound(self, *, held_back=True):
        """Untouched or validly teleported; nothing else has changed; training goes on."""
        assert self.surroundings() == self.around
        if not self.untouched():
            assert all(value.isfinite().all() for value in self.state().values())
            for loss, before in list(zip(self.evaluated(), self.losses, strict=True))[: 1 + held_back]:
                assert abs(loss - before) <= 1.01 * self.config.max_loss_change * before
        self.train()
        assert all(parameter.isfinite().all() for parameter in self.model.parameters())

    def assert_untouched(self):
        assert self.untouched()
        self.assert_sound()


def same(state, other):
    return state.keys() == other.keys() and all(
        state[name].dtype == value.dtype and torch.equal(state[name], value) for name, value in other.items()
    )


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def raising(error):
    def fault(loss):
        raise error

    return fault


def out_of_memory():
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


RAISED = {
    "error": RuntimeError("the cable was pulled"),
    "interrupt": KeyboardInterrupt(),
    "exhausted": StopIteration(),
    "exit": SystemExit(1),
}


def broken(loss, fault, at):
    """A loss whose call number `at` goes wrong."""
    calls = count(1)

    def wrapped(model, batch):
        return fault(loss(model, batch)) if next(calls) == at else loss(model, batch)

    return wrapped


@cache
def looks(method):
    """The numbers of all calls of the loss in an undisturbed event."""
    scene, calls = Scene(method), count(1)
    scene.teleport(lambda model, batch: (next(calls), scene.loss(model, batch))[1])
    return range(1, next(calls))


def failing(monkeypatch, where, error):
    """Let a function fail once, in the given call, after its work."""
    *place, at = where
    if len(place) == 1:
        place = place[0].rsplit(".", 1)
        place[0] = __import__(place[0], fromlist=["_"])
    real, calls = getattr(*place), count(1)

    def wrapped(*args, **kwargs):
        result = real(*args, **kwargs)
        if next(calls) == at:
            raise error
        return result

    monkeypatch.setattr(*place, wrapped)
    return calls


def decomposing(monkeypatch, name, fault, bad):
    """Let a function of torch.linalg fail where `bad(number of the call, matrix)`. Returns the matrices it was given."""
    seen, real = [], getattr(torch.linalg, name)

    def decompose(matrix, **options):
        seen.append(matrix)
        if not bad(len(seen), matrix):
            return real(matrix, **options)
        if fault == "raises":
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return tuple(part * torch.nan for part in real(matrix, **options))

    monkeypatch.setattr(torch.linalg, name, decompose)
    return seen


def images(count=48):
    generator = torch.Generator().manual_seed(0)
    return ImageTensors(torch.randn(count, 1, 8, 8, generator=generator), torch.arange(count) % 4)


def mlp():
    torch.manual_seed(0)
    return MLPForImageClassification(MLPConfig(image_size=8, hidden_sizes=(64, 64), num_labels=4))


def trainer(folder, kind=TeleportTrainer, config=None, made=None, **settings):
    """A run of 12 steps of 8 samples, with a teleport before the seventh."""
    defaults = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    args = TeleportTrainingArguments(output_dir=str(folder), **{**defaults, **settings})
    others = {"train_dataset": images(), **(made or {})}
    if issubclass(kind, TeleportTrainer):
        others["teleport_config"] = config or TeleportConfig(
            method="null_space", steps=[6], num_batches=2, batch_size=4, steps_per_batch=2
        )
    return kind(mlp(), args, **others)


def trained(folder, **settings):
    """The weights that plain Trainer ends with."""
    plain = trainer(folder, Trainer, **settings)
    plain.train()
    return weights(plain.model)
