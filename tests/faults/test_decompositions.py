"""A decomposition that fails is tried again, then its layer stays."""

from contextlib import nullcontext
from unittest import mock

import pytest
import torch

from hf_teleport.layers.subspace import Representation, converging

from faulty import Scene, decomposing, same, trained, trainer, weights


def repeated(scene):
    """More rows than any layer has inputs, of which few differ: a Gram matrix each, and a null space."""
    return [{name: value.repeat(6, *[1] * (value.dim() - 1)) for name, value in batch.items()} for batch in scene.batches]


# Which decomposition, of which method with which settings.
DECOMPOSITIONS = {
    "independent_rows": ("qr", "null_space", {}),
    "rows": ("svd", "null_space", {}),
    "rows_of_each_batch": ("svd", "null_space", {"scope": "batch"}),
    "gram": ("eigh", "null_space", {}),
    "moments": ("eigh", "basis", {}),
    "signs": ("svd", "basis", {"basis": "predicted_decrease"}),
}


def decomposed(kind):
    """A teleport, in which the inputs of the layers are decomposed."""
    name, method, settings = DECOMPOSITIONS[kind]
    scene = Scene(method, **settings)
    # Rows that are seen to be independent are spared all but a QR.
    spared = nullcontext() if name == "qr" else mock.patch.object(Representation, "has_full_rank", return_value=False)
    with spared:
        return scene, scene.teleport(batches=repeated(scene) if kind == "gram" else None)


@pytest.mark.parametrize("fault", ["raises", "nan"])
@pytest.mark.parametrize("kind", DECOMPOSITIONS)
def test_a_decomposition_that_fails_once_is_tried_again(monkeypatch, kind, fault):
    undisturbed, _ = decomposed(kind)
    seen = decomposing(monkeypatch, DECOMPOSITIONS[kind][0], fault, lambda call, matrix: call == 2)
    scene, report = decomposed(kind)
    assert torch.equal(seen[1], seen[2])
    assert report.steps
    assert same(scene.state(), undisturbed.state())
    scene.assert_sound()


@pytest.mark.parametrize("fault", ["raises", "nan"])
@pytest.mark.parametrize("kind", DECOMPOSITIONS)
def test_what_cannot_be_decomposed_stays_and_the_others_move(monkeypatch, kind, fault):
    # The inputs of one layer, the residual stream.
    width = 32 if DECOMPOSITIONS[kind][1] == "basis" else 65
    first = []

    def bad(call, matrix):
        if width in matrix.shape and not first:
            first.append(matrix.clone())
        return bool(first) and matrix.shape == first[0].shape and torch.equal(matrix, first[0])

    decomposing(monkeypatch, DECOMPOSITIONS[kind][0], fault, bad)
    scene, report = decomposed(kind)
    assert first
    assert report.steps
    if kind != "rows_of_each_batch":  # the other batch has its own
        kept = [item for item in (*report.layers, *report.symmetries) if "did not converge" in item.reason]
        assert kept
        assert not any(getattr(item, "moved", False) for item in kept)
    assert any(layer.moved for layer in report.layers)
    scene.assert_sound()


@pytest.mark.parametrize("fault", ["raises", "nan"])
@pytest.mark.parametrize("kind", DECOMPOSITIONS)
def test_where_nothing_can_be_decomposed_nothing_moves(monkeypatch, kind, fault):
    decomposing(monkeypatch, DECOMPOSITIONS[kind][0], fault, lambda call, matrix: True)
    scene, report = decomposed(kind)
    assert (report.steps, report.stopped_because) == (0, "no_direction" if "null" in report.method else "nothing_movable")
    assert any("did not converge" in layer.reason for layer in report.layers)
    scene.assert_untouched()


def test_the_second_try_is_in_float64_on_the_cpu(monkeypatch):
    seen = decomposing(monkeypatch, "eigh", "raises", lambda call, matrix: call == 1)
    values, _ = converging(torch.linalg.eigh, torch.eye(3))
    assert [(matrix.dtype, matrix.device.type) for matrix in seen] == [(torch.float32, "cpu"), (torch.float64, "cpu")]
    assert values.dtype == torch.float32


def test_without_a_decomposition_training_goes_on(tmp_path, monkeypatch):
    for name in ("qr", "svd"):
        decomposing(monkeypatch, name, "raises", lambda call, matrix: True)
    run = trainer(tmp_path)
    run.train()
    assert [report.stopped_because for report in run.teleport_reports] == ["no_direction"]
    assert torch.equal(weights(run.model), trained(tmp_path))
