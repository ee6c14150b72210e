"""The exact Hessian-vector product against dense Hessians in float64."""

import pytest
import torch
from torch import nn

from hf_teleport.layers.hessian import hessian_vector_product
from hf_teleport.layers.point import evaluate

from tiny_runs import flat


def net(width=6):
    return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3)).double()


def rows(count=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 5, generator=generator).double(), torch.randint(0, 3, (count,), generator=generator)


def cross_entropy(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


class Values(nn.Module):
    """Weights of which a loss is a function."""

    def __init__(self, values):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values))


def at(model, loss, batch=None):
    return evaluate(model, loss, batch, seed=0, differentiable_gradients=True)


def test_the_product_is_that_with_the_dense_hessian():
    model, batch = net(), rows()
    point = at(model, cross_entropy, batch)
    names, values = zip(*model.named_parameters(), strict=True)

    def loss(vector):
        parts = vector.split([v.numel() for v in values])
        weights = {n: part.view_as(v) for n, part, v in zip(names, parts, values, strict=True)}
        return nn.functional.cross_entropy(torch.func.functional_call(model, weights, (batch[0],)), batch[1])

    hessian = torch.autograd.functional.hessian(loss, flat(model))
    for direction in (point.gradients, [torch.randn_like(v) for v in values]):
        product = torch.cat([h.flatten() for h in hessian_vector_product(point, direction)])
        dense = hessian @ torch.cat([u.detach().flatten() for u in direction])
        assert (product - dense).norm() <= 1e-12 * dense.norm()


def test_a_part_of_the_product_is_that_of_the_whole():
    model = net()
    point = at(model, cross_entropy, rows())
    whole = dict(zip(point.parameters, hessian_vector_product(point, point.gradients), strict=True))
    wanted = [model[2].bias, model[0].weight]
    for parameter, product in zip(wanted, hessian_vector_product(point, point.gradients, wanted), strict=True):
        torch.testing.assert_close(product, whole[parameter], rtol=1e-12, atol=0)
    assert hessian_vector_product(point, point.gradients, []) == []


def test_a_complex_weight_has_the_product_of_its_two_real_ones():
    point = at(Values([1.0 + 2.0j, -0.5 + 0.3j]), lambda model, batch: model.w.abs().square().square().sum())
    (product,) = hessian_vector_product(point, point.gradients)
    real = torch.view_as_real(point.parameters[0].detach()).flatten()
    hessian = torch.autograd.functional.hessian(lambda w: w.view(2, 2).square().sum(1).square().sum(), real)
    dense = hessian @ torch.view_as_real(point.gradients[0].detach()).flatten()
    torch.testing.assert_close(torch.view_as_real(product).flatten(), dense, rtol=1e-5, atol=0)


def test_a_loss_that_is_linear_has_no_product():
    point = at(Values([1.0, 2.0]), lambda model, batch: 3 * model.w.sum())
    assert hessian_vector_product(point, point.gradients) == [None]


def test_what_has_no_second_derivative_is_refused_with_the_way_out():
    def ctc(model, batch):
        frames = model(batch[0]).log_softmax(-1).unsqueeze(1)
        return nn.functional.ctc_loss(frames, torch.tensor([[1, 2]]), (len(frames),), (2,))

    point = at(net(), ctc, rows())
    with pytest.raises(ValueError, match=r"differentiated twice.*attn_implementation='eager'.*hessian='fast'"):
        hessian_vector_product(point, point.gradients)
