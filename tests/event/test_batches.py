import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BatchEncoding

from hf_teleport.event.batches import halved, num_samples, share_of

FORMS = {
    "tensor": lambda x, y: torch.cat([x, y[:, None]], 1),
    "pair": lambda x, y: (x, y),
    "mapping": lambda x, y: {"x": x, "y": y, "return_loss": True, "scale": 0.5},
    "encoding": lambda x, y: BatchEncoding({"x": x, "y": y}),
    "nested": lambda x, y: {"inputs": [x, {"more": x}], "y": y},
}


def leaves(batch):
    if isinstance(batch, torch.Tensor):
        return [batch]
    values = batch.values() if hasattr(batch, "values") else batch
    return [leaf for value in values if not isinstance(value, (bool, float)) for leaf in leaves(value)]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@given(samples=st.integers(1, 12), count=st.integers(1, 4))
def test_shares_are_the_batch_in_order(form, samples, count):
    batch = form(torch.randn(samples, 3), torch.arange(samples).float())
    assert num_samples(batch) == samples
    shares = [share_of(batch, i, count) for i in range(count)]
    if samples % count:
        assert all(share is batch for share in shares)
    else:
        assert all(type(share) is type(batch) for share in shares)
        for whole, *parts in zip(leaves(batch), *map(leaves, shares), strict=True):
            assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@given(sizes=st.lists(st.integers(2, 9), min_size=1, max_size=3))
def test_halves_are_the_batches_in_order(form, sizes):
    batches = [form(torch.randn(size, 3), torch.arange(size).float()) for size in sizes]
    parts = halved(batches)
    assert len(parts) == 2 * len(batches)
    assert max(map(num_samples, parts)) == max((size + 1) // 2 for size in sizes)
    for i, batch in enumerate(batches):
        for whole, first, second in zip(leaves(batch), leaves(parts[2 * i]), leaves(parts[2 * i + 1]), strict=True):
            assert torch.equal(torch.cat([first, second]), whole)


@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": torch.zeros(1, 8), "cu_seqlens": torch.zeros(3)},  # packed: the first sizes count other things
        {"x": torch.zeros(4, 2), "names": ["a", "b", "c", "d"]},
        {"x": torch.zeros(4, 2), "temperature": torch.tensor(1.0)},
        ["no", "tensor"],
        {},
    ],
)
def test_what_cannot_be_cut_stays_whole(batch):
    assert num_samples(batch) is None
    assert share_of(batch, 0, 2) is batch
    assert halved([torch.zeros(4), batch]) is None


def test_one_sample_has_no_half():
    assert halved([torch.zeros(4, 2), torch.zeros(1, 2)]) is None
