"""What `benchmark.py` lets compete: a teleport step, fits of null spaces, and whole events.

A contestant is a function that makes ready, which is not timed, and returns the function that is.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from benchmark_models import Batch, Work, loss_fn
from torch import Tensor

from hf_teleport import TeleportConfig, Teleporter
from hf_teleport.layers.audit import audit
from hf_teleport.layers.layer import Layer
from hf_teleport.layers.point import Point, evaluate
from hf_teleport.layers.subspace import Representation, core_dims, null_space, rank_tolerance
from hf_teleport.methods import NullSpace
from hf_teleport.methods.null_space.direction import exact_direction
from hf_teleport.weights.isolation import evaluation_mode
from hf_teleport.weights.norms import norm

Run = Callable[[], Any]
Contestant = Callable[[], Run]

# A step of any length costs the same. Short ones meet no guard, and leave the weights about where they were.
_SHORT = 1e-4


class Turn:
    """A batch's turn in an event after its first step; a call is one step more, as the teleporter makes it."""

    def __init__(self, work: Work, hessian: Literal["fast", "exact"]):
        self.method = NullSpace(work.model, loss_fn, TeleportConfig(hessian=hessian, learning_rate=_SHORT))
        self.method.survey(self.method.evaluate(work.batch, 0))
        self.method.fit()
        self.to_undo_the_event = self.method.snapshot()
        self.point = self.method.begin(work.batch, 0)
        self()

    def __call__(self) -> None:
        move = self.method.propose(self.point)
        if move is None:
            raise ValueError("this batch has no null space; take a wider or a deeper model.")
        self.point.release()
        move.make()
        self.point = self.method.evaluate_again(self.point)


def svd_fit(rows: Tensor) -> Tensor:
    """Core space (G, d, k) of rows (G, N, d) by an SVD of the representation matrix, as the paper finds it."""
    vectors, values, _ = torch.linalg.svd(rows.mT, full_matrices=False)
    return _core(vectors, values)


def gram_fit(rows: Tensor) -> Tensor:
    """Core space by eigenvectors of the smaller Gram matrix, in float64 because it squares the condition number."""
    rows = rows.double()
    narrow = rows.shape[-2] < rows.shape[-1]
    squares, vectors = torch.linalg.eigh(rows @ rows.mT if narrow else rows.mT @ rows)
    values, vectors = squares.clamp(min=0).sqrt().flip(-1), vectors.flip(-1)
    vectors = rows.mT @ vectors / values[..., None, :] if narrow else vectors
    return _core(vectors.float(), values)


def _core(vectors: Tensor, values: Tensor) -> Tensor:
    return vectors[..., : int(core_dims(values, 1.0, rank_tolerance(vectors.shape[-2], torch.float32)).max())]


def fit(rows: Tensor) -> Tensor:
    """Core or null space as the package chooses."""
    representation = Representation()
    representation.add(rows)
    return null_space(representation, 1.0).basis


def fits(matrices: Callable[[], list[Tensor]]) -> dict[str, Contestant]:
    """Every way to fit, each to all of the same rows (G, N, d)."""

    def ready(way: Callable[[Tensor], Tensor]) -> Run:
        each = matrices()
        return lambda: [way(rows) for rows in each]

    return {way.__name__: partial(ready, way) for way in (svd_fit, gram_fit, fit)}


def rows_of(layer: Layer, point: Point) -> Tensor:
    """What a layer reads in a batch, (G, N, d)."""
    uses = point.trace.uses[layer.weight][layer.region]
    return torch.cat([layer.rows(use.call.projector, use.call.input.detach()) for use in uses], dim=1)


def layers_at(work: Work, batch: Batch) -> tuple[list[Layer], Point]:
    """The layers that may move, and where the batch stands."""
    with evaluation_mode(work.model):
        point = evaluate(work.model, loss_fn, batch, seed=0)
        return audit(work.model, point, TeleportConfig())[0], point


def rows_of_layers(work: Work) -> list[Tensor]:
    layers, point = layers_at(work, work.batch)
    return [rows_of(layer, point) for layer in layers]


def event(work: Work, batches: list[Batch], steps: int, **settings: Any) -> Run:
    """An event of as many steps on each batch: growth is no reason to end a turn, which would make it cheap."""
    config = TeleportConfig(steps_per_batch=steps, max_growth=None, learning_rate=_SHORT, **settings)
    return lambda: Teleporter(work.model, config).teleport(batches, loss_fn).steps


def paper_event(work: Work, batches: list[Batch], steps: int) -> Run:
    """Algorithm 1 of arXiv 2502.11362 as published: an SVD for each layer and batch, and steps by double backward.

    It is told which layers may move.
    """
    layers, _ = layers_at(work, batches[0])
    length = norm(parameter for layer in layers for parameter in layer.parameters)

    def turn(batch: Batch, seed: int) -> None:
        look = partial(evaluate, work.model, loss_fn, batch, seed=seed, differentiable_gradients=True)
        point = look()
        cores = {layer: svd_fit(rows_of(layer, point)) for layer in layers}
        for step in range(steps):
            products = exact_direction(point, point.gradients, layers)
            moves = {layer: product - product @ cores[layer] @ cores[layer].mT for layer, product in products.items()}
            rate = _SHORT * length / norm(moves.values())
            for layer, move in moves.items():
                layer.add_(move, rate)
            point = look() if step + 1 < steps else point

    def run() -> int:
        with evaluation_mode(work.model):
            for seed, batch in enumerate(batches):
                turn(batch, seed)
        return len(batches) * steps

    return run
