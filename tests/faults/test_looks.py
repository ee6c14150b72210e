"""A fault at each look at the loss: the weights are those before, bit for bit, or validly teleported."""

import pytest
import torch

from faulty import METHODS, RAISED, Scene, broken, looks, raising


class BrokenBackward(torch.autograd.Function):
    """The identity, whose gradient is NaN."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.nan


NOT_FINITE = {
    "nan": lambda loss: loss * torch.nan,
    "inf": lambda loss: loss + torch.inf,
    "nan_gradient": BrokenBackward.apply,
}
NO_LOSS = {"no_scalar": lambda loss: loss.expand(2), "detached": lambda loss: loss.detach(), "none": lambda loss: None}


@pytest.mark.parametrize("error", RAISED.values(), ids=RAISED)
@pytest.mark.parametrize("method", METHODS)
def test_an_error_at_any_look_reaches_the_user_and_leaves_no_trace(method, error):
    scene = Scene(method)
    for at in looks(method):
        with pytest.raises(type(error)) as raised:
            scene.teleport(broken(scene.loss, raising(error), at))
        assert raised.value is error, at
        assert scene.untouched(), at
        assert scene.surroundings() == scene.around, at
    scene.assert_sound()


@pytest.mark.parametrize("fault", NOT_FINITE.values(), ids=NOT_FINITE)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_finite_at_any_look_is_no_move_or_a_valid_one(method, fault):
    ends = []
    for at in looks(method):
        scene = Scene(method)
        report = scene.teleport(broken(scene.loss, fault, at))
        assert scene.untouched() == (report.steps == 0), at
        ends.append(report.stopped_because)
        scene.assert_sound()
    assert ends[0] == ends[-1] == "non_finite"
    # A step that only fails once is made at half its length.
    assert method == "basis" or ends.count("steps_done") > 4


@pytest.mark.parametrize("fault", NO_LOSS.values(), ids=NO_LOSS)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_no_loss_is_an_error_or_goes_unseen(method, fault):
    """A forward at shifted weights looks at no loss."""
    raised = 0
    for at in looks(method):
        scene = Scene(method)
        try:
            assert scene.teleport(broken(scene.loss, fault, at)).steps
        except (ValueError, TypeError, RuntimeError):
            raised += 1
            assert scene.untouched(), at
        scene.assert_sound()
    assert raised >= 3
