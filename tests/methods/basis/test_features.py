import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hf_teleport.methods.basis.features import NONE, Facts, compact, components, signatures, varies


def parameter(*shape):
    return nn.Parameter(torch.zeros(shape))


def test_axes_are_numbered_as_they_are_asked_for():
    facts, a, b = Facts(), parameter(2, 3), parameter(4)
    assert facts.axis(a, 1).features.tolist() == [0, 1, 2]
    assert facts.axis(b, 0).features.tolist() == [3, 4, 5, 6]
    assert facts.axis(a, 0).features.tolist() == [7, 8]
    assert facts.axis(a, -1) is facts.axis(a, 1)
    assert facts.count == 9


def note_one_of_each(facts):
    features = torch.arange(3)
    facts.note_same(features, features.flip(0))
    facts.note_together(features, split="why")
    facts.note_fixed(features, "why")
    facts.note_flag(features, "residual")


def lists(facts):
    return [facts.same, facts.together, facts.fixed, facts.split, facts.flags]


def test_facts_after_a_mark_are_forgotten_and_those_before_stay():
    facts = Facts()
    facts.axis(parameter(3), 0)
    note_one_of_each(facts)
    mark = facts.mark()
    note_one_of_each(facts)
    facts.axis(parameter(2), 0)
    facts.forget_since(mark)
    assert [len(noted) for noted in lists(facts)] == [1] * 5
    assert facts.count == 5, "numbers that were given are not given again"


def test_the_number_of_no_feature_is_in_no_fact():
    facts, some = Facts(), torch.tensor([0, NONE, 2])
    facts.note_same(some, torch.tensor([3, 4, NONE]))
    facts.note_together(some, (0,), split="why")
    facts.note_fixed(some, "why")
    facts.note_flag(some, "residual")
    assert [t.tolist() for t in facts.same[0]] == [[0], [3]]
    assert [t.tolist() for t in facts.together[0]] == [[0, 2], [0, 2]]
    assert all(noted[0][0].tolist() == [0, 2] for noted in (facts.fixed, facts.split, facts.flags))


def test_same_features_are_paired_element_by_element_after_broadcasting():
    facts = Facts()
    facts.note_same(torch.arange(6).reshape(2, 1, 3).expand(2, 5, 3), torch.arange(6, 9))
    a, b = facts.same[0]
    assert list(zip(a.tolist(), b.tolist(), strict=True)) == [(0, 6), (1, 7), (2, 8), (3, 6), (4, 7), (5, 8)]


def test_keyed_dims_have_keys_of_their_own():
    facts = Facts()
    facts.note_together(torch.arange(12).reshape(2, 3, 2), (0, 1))
    features, keys = facts.together[0]
    assert keys[features.argsort()].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


@given(shape=st.lists(st.integers(1, 3), min_size=1, max_size=4), kept=st.integers(0, 15), expanded=st.booleans())
def test_compact_cuts_down_exactly_the_dims_without_variation(shape, kept, expanded):
    own = [size if kept >> dim & 1 else 1 for dim, size in enumerate(shape)]
    values = torch.arange(torch.Size(own).numel()).reshape(own)
    features = values.expand(shape) if expanded else values.expand(shape).clone()
    assert torch.equal(compact(features), values)
    assert varies(features) == [dim for dim, size in enumerate(own) if size > 1]


def union_find(count, pairs):
    root = list(range(count))

    def find(i):
        while root[i] != i:
            i = root[i]
        return i

    for a, b in pairs:
        a, b = sorted((find(a), find(b)))
        root[b] = a
    return [find(i) for i in range(count)]


@given(st.data(), st.integers(1, 40), st.integers(1, 3))
def test_components_equal_a_plain_union_find(data, count, calls):
    node = st.integers(0, count - 1)
    pairs = [data.draw(st.lists(st.tuples(node, node), max_size=count)) for _ in range(calls)]
    tensors = [tuple(torch.tensor(pair, dtype=torch.long).reshape(-1, 2).T) for pair in pairs]
    assert components(count, tensors).tolist() == union_find(count, [pair for call in pairs for pair in call])


@pytest.mark.parametrize("order", ["up", "down", "shuffled"])
def test_components_of_a_long_chain(order):
    nodes = {"up": torch.arange(1000), "down": torch.arange(1000).flip(0), "shuffled": torch.randperm(1000)}[order]
    assert not components(1000, [(nodes[:-1], nodes[1:])]).any()


def test_without_pairs_each_is_alone():
    assert components(3, []).tolist() == [0, 1, 2]


@given(st.data(), st.integers(1, 8), st.integers(0, 4))
def test_signatures_are_equal_if_and_only_if_all_operations_take_both_alike(data, count, calls):
    root = torch.arange(count)
    entry = st.tuples(st.integers(0, count - 1), st.integers(0, 2))
    together = [data.draw(st.lists(entry, max_size=12)) for _ in range(calls)]
    tensors = [tuple(torch.tensor(call, dtype=torch.long).reshape(-1, 2).T) for call in together]
    found = signatures(root, tensors).tolist()
    taken = [[sorted(key for feature, key in call if feature == i) for call in together] for i in range(count)]
    for i in range(count):
        for j in range(count):
            assert (found[i] == found[j]) == (taken[i] == taken[j])


def test_copies_count_and_features_go_by_their_root():
    root = torch.tensor([0, 1, 2, 0, 1])  # two copies of 0 and of 1
    found = signatures(root, [(torch.arange(5), torch.zeros(5, dtype=torch.long))])
    assert found[0] == found[1] != found[2]
    assert not found[3:].any()
