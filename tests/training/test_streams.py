"""From a stream that can be read only once an event takes nothing."""

import pytest
from torch.utils.data import DataLoader, IterableDataset

from hf_teleport.training.drawing import read_once

from drawn_runs import assert_as_without, own_loader, run
from tiny_runs import Stream, Texts, pad


class Once(IterableDataset):
    """A stream that goes on where it was left."""

    def __init__(self):
        self.source = iter(Texts(40).rows)

    def __iter__(self):
        return self.source


class OnceInside(Once):
    def __iter__(self):
        yield from self.source


class Queue(IterableDataset):
    def __init__(self):
        self.rows = Texts(40).rows

    def __iter__(self):
        return self

    def __next__(self):
        if not self.rows:
            raise StopIteration
        return self.rows.pop(0)


class Around(IterableDataset):
    def __init__(self):
        self.streams = [Once()]

    def __iter__(self):
        for stream in self.streams:
            yield from stream


ONCE = {"shared": Once, "inside": OnceInside, "itself": Queue, "around": Around}


@pytest.mark.parametrize("method", ["auto", "null_space"])
@pytest.mark.parametrize("stream", ONCE.values(), ids=ONCE)
def test_from_a_stream_that_can_be_read_once_nothing_is_taken(tmp_path, caplog, stream, method):
    trainer = assert_as_without(
        tmp_path, made=lambda: {"train_dataset": stream()}, events=0, config={"steps": None, "method": method}
    )
    assert "can be read only once" in caplog.text
    assert "teleport_dataset" in caplog.text
    with pytest.raises(ValueError, match="can be read only once"):
        trainer.teleport()


@pytest.mark.parametrize("stream", ONCE.values(), ids=ONCE)
def test_beside_such_a_stream_rows_of_their_own_teleport(tmp_path, stream):
    assert_as_without(tmp_path, made=lambda: {"train_dataset": stream(), "teleport_dataset": Texts(6)})


def test_rows_to_teleport_on_that_come_to_their_end(tmp_path, caplog):
    class Few(Once):
        def __init__(self):
            self.source = iter(Texts(5).rows)

    trainer = assert_as_without(
        tmp_path, made=lambda: {"teleport_dataset": Few()}, config={"steps": [1, 3]}, events=1, eval_strategy="no"
    )
    assert trainer.state.global_step == 4
    assert "No teleport before step 3: the data set to teleport on is empty" in caplog.text


def test_a_loader_that_can_be_read_once(tmp_path, caplog):
    mixin = own_loader(lambda: DataLoader(Once(), batch_size=4, collate_fn=pad))
    assert_as_without(tmp_path, mixin, lambda: {"train_dataset": None}, events=0)
    assert "can be read only once" in caplog.text
    assert read_once(batch for batch in [1])
    assert not any(map(read_once, ([1], Stream(), DataLoader(Stream()), DataLoader([1, 2]), None, Texts())))


def test_where_no_teleport_is_due_nothing_is_said(tmp_path, caplog):
    run(tmp_path, made={"train_dataset": Once()}, off=True)
    assert "read only once" not in caplog.text
