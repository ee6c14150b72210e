"""Pictures of a run: what is drawn where, and what is left out."""

import io
import math

import numpy as np
import pytest
from PIL import Image

from hf_teleport.reporting import plots


def layer(name, null_dim=None, input_dim=None, moved_by=0.0):
    return {"name": name, "null_dim": null_dim, "input_dim": input_dim, "moved_by": moved_by}


def event(step, *layers, **others):
    return {"step": step, "method": "null_space", "rolled_back": False, "layers": list(layers), "symmetries": [], **others}


def symmetry(name, misalignment, after=None, kind="stream", blocks=1):
    return {"kind": kind, "name": name, "blocks": blocks, "misalignment": misalignment, "misalignment_after": after}


EVENTS = [
    event(0, layer("a", 3, 4, 0.01), layer("b", 0, 4), layer("c")),
    event(8, layer("a", 1, 4, 0.5), layer("b", 2, 4, None), layer("c", moved_by=1e-7), rolled_back=True),
]
LOG = [
    {"step": 2, "loss": 3.0, "grad_norm": 1.0},
    {"step": 2, "eval_loss": 4.0, "eval_runtime": 1.0},
    {"step": 2, "teleport/method": "basis", "teleport/loss_before": 3.0},
    {"step": 4, "loss": 2.0, "grad_norm": math.nan},
    {"step": 6, "loss": None, "grad_norm": "none"},
    {"step": 8, "loss": 1.5, "grad_norm": 0.5},
]


def drawn(figure):
    """That it can be drawn, and its axes."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    assert Image.open(file).size[0] > 300
    return figure.axes


def lines(axes):
    return {line.get_label(): np.array(line.get_xydata()).tolist() for line in axes.get_lines()}


def test_curves_of_what_was_logged_with_the_events_on_them():
    above, below = drawn(plots.training(LOG, EVENTS))
    assert (above.get_ylabel(), below.get_ylabel(), below.get_xlabel()) == ("loss", "gradient norm", "step")
    found = lines(above)
    assert found["training loss"] == [[2, 3.0], [4, 2.0], [8, 1.5]]
    assert found["eval loss"] == [[2, 4.0]]
    assert [found[name][0][0] for name in ("teleport, null_space", "teleport, null_space, undone")] == [0, 8]
    assert lines(below)["gradient norm"] == [[2, 1.0], [8, 0.5]]
    styles = {line.get_label(): line.get_linestyle() for line in above.get_lines()}
    assert (styles["teleport, null_space"], styles["teleport, null_space, undone"]) == ("--", ":")


@pytest.mark.parametrize(("losses", "scale"), [((3.0, 2.0), "linear"), ((3.0, 0.01), "log"), ((3.0, -0.01), "linear")])
def test_scale_of_the_losses(losses, scale):
    (axes,) = drawn(plots.training([{"step": i, "loss": loss} for i, loss in enumerate(losses)], []))
    assert axes.get_yscale() == scale


@pytest.mark.parametrize(
    ("values", "scale"),
    [((5.6, 6.8), "linear"), ((0.1, 2), "log"), ((0, 9), "linear"), ((math.inf, 1, math.nan), "linear"), ((), "linear")],
)
def test_scale_of_numbers(values, scale):
    assert plots.scale_of(values) == scale


def heat_map(figure):
    axes, _ = drawn(figure)
    values = np.ma.filled(axes.get_images()[0].get_array().astype(float), math.nan)
    names = [label.get_text() for label in axes.get_yticklabels()]
    columns = [tick.label1.get_text() for tick in axes.xaxis.get_major_ticks()]
    return values.tolist(), names, columns, axes.get_title()


def test_shares_of_null_dimensions():
    values, names, columns, label = heat_map(plots.null_dimensions(EVENTS))
    assert (values, names) == ([[0.75, 0.25], [0.0, 0.5]], ["a", "b"])
    assert columns == ["0\nnull_space", "8\nnull_space"]
    assert label == "null dimensions / input dimensions"


def test_captured_variance_below_a_threshold_of_one():
    events = [event(0, {**layer("a"), "captured": 0.99}, {**layer("b"), "captured": 1.0}, layer("c"))]
    values, names, _, label = heat_map(plots.captured(events))
    assert (values, names) == ([[0.99], [1.0]], ["a", "b"])
    assert "variance captured" in label
    assert plots.captured([event(0, {**layer("a"), "captured": 1.0})]) is None


def test_movement_leaves_out_what_never_moved_and_blanks_what_stayed():
    values, names, _, _ = heat_map(plots.movement(EVENTS))
    assert names == ["a", "c"]
    assert values[0] == [0.01, 0.5]
    assert math.isnan(values[1][0])
    assert values[1][1] == 1e-7


def test_layers_stand_in_the_models_order():
    events = [event(0, layer("a"), layer("b", moved_by=1.0)), event(1, layer("a", moved_by=1.0), layer("b"))]
    assert heat_map(plots.movement(events))[1] == ["a", "b"]


def test_misalignment_of_each_symmetry():
    events = [
        event(3, symmetries=[symmetry("x", 0.7), symmetry("y", None), symmetry("z", 0.2)]),
        event(5),
        event(9, symmetries=[symmetry("z", 0.0)]),
    ]
    (axes,) = drawn(plots.misalignment(events))
    assert lines(axes) == {"before step 3": [[0.7, 0], [0.2, 1]], "before step 9": [[0.0, 1]]}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["stream x", "stream z"]


def test_misalignment_falls_at_each_event_and_grows_until_the_next():
    heads = [symmetry("v", 0.6, 0.2, "value_output", blocks=3), symmetry("w", 0.2, 0.0, "value_output")]
    events = [
        event(10, symmetries=[symmetry("x", 0.8, 0.1), *heads, symmetry("y", None)]),
        event(15),
        event(20, symmetries=[symmetry("x", 0.4, 0.3)], rolled_back=True),
    ]
    (axes,) = drawn(plots.misalignment_over_run(events))
    found = lines(axes)
    assert found["stream"] == [[10, 0.8], [10, 0.1], [20, 0.4]]  # what was undone is as it was
    np.testing.assert_allclose(found["value_output"], [[10, 0.5], [10, 0.15]])
    falls = [line for name, line in found.items() if name.startswith("_")]
    assert [[10, 0.8], [10, 0.1]] in falls
    assert [[10, 0.1], [20, 0.4]] not in falls


@pytest.mark.parametrize("events", [[], [event(0)], [event(0, layer("a", moved_by=None))], [{"step": 3, "seconds": 1.0}]])
def test_nothing_to_draw(events):
    assert plots.training([{"step": 1, "train_runtime": 3.0}], events) is None
    assert plots.captured(events) is None
    assert plots.null_dimensions(events) is plots.movement(events) is plots.misalignment(events) is None
    assert plots.misalignment_over_run(events) is None


def test_many_layers_and_events_have_room_and_some_names():
    layers = [layer(f"model.layers.{i}.a_module_with_a_long_name.and_another_one.$weight", 1, 2, 0.1) for i in range(500)]
    events = [event(step, *layers) for step in range(60)]
    values, names, columns, _ = heat_map(plots.movement(events))
    assert (len(values), len(values[0])) == (500, 60)
    assert len(names) <= 200
    assert len(columns) <= 24
    assert all(name.startswith("…") and len(name) <= 49 for name in names)


def test_the_top_of_a_tall_picture_has_scale_and_steps():
    for count, tall in ((10, False), (200, True)):
        figure = plots.movement([event(0, *(layer(f"{i}", 1, 2, 0.1 + i) for i in range(count)))])
        axes, bar = drawn(figure)
        assert all(tick.label2.get_visible() == tall for tick in axes.xaxis.get_major_ticks())
        assert bar.get_position().y1 == pytest.approx(axes.get_position().y1)
        assert bar.get_position().height * figure.get_figheight() < 7.1


def test_dark_and_light():
    colors = []
    for dark in (False, True):
        with plots.style(dark):
            colors.append(plots.movement(EVENTS).get_facecolor()[:3])
    assert sum(colors[0]) == 3
    assert sum(colors[1]) < 0.5
