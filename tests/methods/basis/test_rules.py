"""Each family of operations in a small module: turned at random, its outputs stay, and what may turn is found."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_teleport.methods.basis.bases import Random, balance
from hf_teleport.methods.basis.symmetries import find_symmetries
from hf_teleport.methods.basis.turn import Turn

BATCH, LENGTH, WIDTH = 3, 5, 6


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Small(nn.Module):
    """Modules and parameters by name, all of them random, and a forward that uses them."""

    def __init__(self, forward, **members):
        super().__init__()
        self.function = forward
        for name, member in members.items():
            setattr(self, name, member)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.5 * torch.randn_like(parameter) + (parameter.dim() == 1))

    def forward(self, x):
        return self.function(self, x)


def loss_fn(model, x):
    """Fixes all outputs."""
    output = model(x)
    return (output - torch.arange(output.numel()).cos().view_as(output)).square().mean()


def sequences():
    return torch.randn(BATCH, LENGTH, WIDTH)


def found(model, x=None):
    """Those that are used, and those that are left out. Turned at random, they leave the outputs as they are, for all inputs."""
    x = sequences() if x is None else x
    symmetries, _ = find_symmetries(model, loss_fn, x)
    used = [s for s in symmetries if not s.reason]
    inputs = [x, x.flip(0), x[:1]] if not x.is_floating_point() else [x, torch.randn_like(x), x[:1] + 1]
    before, weights = [model(i) for i in inputs], [p.detach().clone() for p in model.parameters()]
    Turn({s: balance(s) if s.kind == "scaling" else Random(used, 0).choose(s) for s in used}).carry_out()
    moved = {p for p, w in zip(model.parameters(), weights, strict=True) if (p - w).norm() > 1e-3 * w.norm()}
    for i, expected in zip(inputs, before, strict=True):
        assert (model(i) - expected).norm() <= 1e-10 * expected.norm()
    assert {part.parameter for s in used for part in s.parts} <= moved, "a turn turns"
    return used, [s for s in symmetries if s.reason]


def kinds(symmetries):
    return {(s.kind, s.blocks, s.size) for s in symmetries}


def reasons(symmetries, name):
    """Why the features that a weight writes are left out."""
    return {s.reason for s in symmetries if s.name == name}


def linear(inputs=WIDTH, outputs=8, bias=True):
    return nn.Linear(inputs, outputs, bias=bias)


# --- Chains of layers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_a_chain_of_layers(bias):
    model = Small(lambda m, x: m.c(m.b(m.a(x))), a=linear(bias=bias), b=linear(8, 7, bias), c=linear(7, 3, bias))
    used, left = found(model)
    assert kinds(used) == {("chain", 1, 8), ("chain", 1, 7)}
    assert not any(s.centred for s in used)
    assert {s.name for s in left} == {"c"}, "the outputs"


def test_an_activation_function_in_between_fixes():
    used, left = found(Small(lambda m, x: m.b(F.gelu(m.a(x))), a=linear(), b=linear(8, 3)))
    assert not used
    assert reasons(left, "a") == {"passes through gelu"}


def test_relu_leaves_positive_factors():
    used, _ = found(Small(lambda m, x: m.b(F.relu(m.a(x))), a=linear(bias=False), b=linear(8, 3)))
    assert kinds(used) == {("scaling", 8, 1)}


@pytest.mark.parametrize("gate", [F.silu, F.gelu, torch.sigmoid])
def test_a_gate_leaves_factors_of_what_it_multiplies(gate):
    model = Small(lambda m, x: m.b(gate(m.g(x)) * m.a(x)), a=linear(bias=False), g=linear(), b=linear(8, 3))
    used, left = found(model)
    assert kinds(used) == {("scaling", 8, 1)}
    assert {part.parameter for part in used[0].parts} == {model.a.weight, model.b.weight}
    assert reasons(left, "g") == {f"passes through {gate.__name__}"}


def test_bare_parameters_as_weights():
    model = Small(
        lambda m, x: m.d @ (x @ m.a @ m.b.T @ m.c).mT,
        a=nn.Parameter(torch.empty(WIDTH, 8)),
        b=nn.Parameter(torch.empty(7, 8)),
        c=nn.Parameter(torch.empty(7, 4)),
        d=nn.Parameter(torch.empty(3, 4)),
    )
    used, _ = found(model)
    assert kinds(used) == {("chain", 1, 8), ("chain", 1, 7), ("chain", 1, 4)}


def test_a_weight_that_is_used_again_and_again_turns_on_both_sides():
    model = Small(lambda m, x: m.c(m.b(m.b(m.a(x)))), a=linear(), b=linear(8, 8), c=linear(8, 3))
    used, _ = found(model)
    assert kinds(used) == {("chain", 1, 8)}
    assert {part.dim for part in used[0].parts if part.parameter is model.b.weight} == {0, 1}


@pytest.mark.parametrize("kernel", [1, 2])
def test_convolutions(kernel):
    convs = nn.Sequential(nn.Conv1d(WIDTH, 8, kernel), nn.Conv1d(8, 7, kernel, padding=1, bias=False), nn.ReLU())
    used, _ = found(Small(lambda m, x: m.b(m.a(x.mT)).mT, a=convs, b=nn.Conv1d(7, 3, kernel)))
    assert kinds(used) == {("chain", 1, 8), ("scaling", 7, 1)}


def test_grouped_convolutions_fix():
    model = Small(lambda m, x: m.b(m.a(x.mT)).mT, a=nn.Conv1d(WIDTH, 8, 1), b=nn.Conv1d(8, 4, 1, groups=2))
    used, left = found(model)
    assert not used
    assert reasons(left, "a") == {"read in groups"}


# --- Moving and joining values -------------------------------------------------------------------------------------------

PASSES = {
    "masked_fill": lambda x: x.masked_fill(torch.tensor([True, False, False, False, True])[:, None], 0.0),
    "where": lambda x: torch.where(torch.tensor([True, False, False, False, True])[:, None], x, torch.zeros(())),
    "mean over tokens": lambda x: x.mean(1),
    "mean over tokens, kept": lambda x: x.mean(dim=1, keepdim=True),
    "cumsum": lambda x: x.cumsum(1),
    "weights of tokens": lambda x: x * torch.rand(LENGTH, 1),
    "mixing of tokens": lambda x: torch.rand(LENGTH, LENGTH).tril() @ x,
    "some tokens": lambda x: x[:, [3, 1, 1]],
    "tokens one after another": lambda x: torch.cat([x, 2 * x], 1),
    "a constant that is zero": lambda x: x + torch.zeros(8),
    "its difference from the mean token": lambda x: x - x.mean(1, keepdim=True),
    "there and back": lambda x: x.reshape(-1, 2, 4).transpose(0, 1).flatten(1).unflatten(1, (-1, 4)).permute(1, 0, 2).flatten(1),
    "minus": lambda x: -x / 3,
    "features the other way round": lambda x: x.flip(-1).roll(3, -1),
    "dropout in eval mode": lambda x: F.dropout(x, 0.5, training=False),
}


@pytest.mark.parametrize("operation", PASSES)
def test_what_rotations_pass_through(operation):
    torch.manual_seed(1)
    function, state = PASSES[operation], torch.get_rng_state()

    def forward(model, x):
        torch.set_rng_state(state)
        return model.b(function(model.a(x)))

    used, _ = found(Small(forward, a=linear(), b=linear(8, 3)))
    assert [(s.blocks, s.size) for s in used] == [(1, 8)]


STOPS = {
    "a constant": (lambda x: x + 1, "a constant is added"),
    "a constant in front": (lambda x: 1 - x, "a constant is added"),
    "a table": (lambda x: x + torch.arange(8), "a constant is added"),
    "another number for each": (lambda x: x * torch.arange(8), "multiplied by a number of its own"),
    "the same features": (lambda x: x * x, "multiplied with other features"),
    "mean over features": (lambda x: x.mean(-1, keepdim=True).expand(-1, -1, 8), "mean over features"),
    "all values": (lambda x: x.sum() * torch.ones(BATCH, LENGTH, 8), "all values go through sum"),
    "a mask of features": (lambda x: x.masked_fill(torch.arange(8) > 3, 0.0), "some features are masked"),
    "values filled in": (lambda x: x.masked_fill(torch.arange(LENGTH)[:, None] > 3, 1.0), "some values are filled in"),
    "a branch that is constant": (lambda x: torch.where(x > 0, x, 1.0), "passes through gt"),
    "a matrix": (lambda x: x @ torch.arange(64.0).view(8, 8), "features are multiplied with a matrix that is no weight"),
    "two sets of features": (lambda x: x.mT @ x @ torch.ones(8, 8), "two sets of features meet in matmul"),
    "a copy in place": (lambda x: torch.empty_like(x).copy_(x), "passes through copy"),
}


@pytest.mark.parametrize("operation", STOPS)
def test_what_stops_rotations(operation):
    function, reason = STOPS[operation]
    model = Small(lambda m, x: m.b(function(m.a(x))), a=linear(), b=linear(8, 3))
    symmetries, _ = find_symmetries(model, loss_fn, sequences())
    if operation in ("another number for each", "a mask of features"):
        assert {s.kind for s in symmetries if not s.reason} == {"scaling"}  # a factor passes
        return
    assert not [s for s in symmetries if not s.reason]
    assert any(r.startswith(reason) for r in reasons(symmetries, "a")), reasons(symmetries, "a")


def test_a_constant_added_to_some_features_leaves_the_others():
    model = Small(
        lambda m, x: m.b(m.a(x)[..., :3]) + m.c(m.a(x)[..., 3:] + 1),
        a=linear(),
        b=linear(3, 3),
        c=linear(5, 3),
    )
    used, left = found(model)
    assert kinds(used) == {("chain", 1, 3)}
    assert {(s.size, s.reason) for s in left if s.name == "a"} == {(5, "a constant is added")}


def test_rows_put_back_by_index_add():
    def forward(m, x):
        rows = m.e(x).flatten(0, 1)
        out = torch.zeros_like(rows)
        chosen = torch.arange(len(rows)) % 3 == 0
        for expert, index in ((m.a, chosen.nonzero()[:, 0]), (m.b, (~chosen).nonzero()[:, 0])):
            out.index_add_(0, index, expert(rows[index]))
        return m.c(out + rows)

    used, _ = found(Small(forward, e=linear(), a=linear(8, 8), b=linear(8, 8), c=linear(8, 3)))
    assert kinds(used) == {("stream", 1, 8)}


def test_a_class_token_before_the_patches_of_an_image():
    def forward(m, x):
        patches = m.patch(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([m.token.expand(len(x), -1, -1), patches], 1) + m.position
        return m.head(F.layer_norm(tokens + m.b(tokens.mean(1, keepdim=True)), (8,))[:, 0])

    model = Small(
        forward,
        patch=nn.Conv2d(3, 8, 4, stride=4),
        token=nn.Parameter(torch.empty(1, 1, 8)),
        position=nn.Parameter(torch.empty(1, 5, 8)),
        b=linear(8, 8),
        head=linear(8, 3),
    )
    used, _ = found(model, torch.randn(BATCH, 3, 8, 8))
    assert kinds(used) == {("stream", 1, 8)}
    assert used[0].centred
    weights = {model.patch.weight, model.patch.bias, model.token, model.position, model.b.weight, model.b.bias, model.head.weight}
    assert set(used[0].parameters) == weights


# --- The residual stream -------------------------------------------------------------------------------------------------


def tokens():
    return torch.randint(0, 9, (BATCH, LENGTH))


def stream(norm, post=False, tied=False):
    """Embeddings, two MLPs with norms, a last norm and a head."""

    def forward(m, ids):
        x = m.embed(ids)
        for up, down, first in ((m.up1, m.down1, m.norm1), (m.up2, m.down2, m.norm2)):
            x = first(x + down(F.gelu(up(x)))) if post else x + down(F.gelu(up(first(x))))
        x = x if post else m.last(x)
        return F.linear(x, m.embed.weight) if tied else m.head(x)

    mlps = {"up1": linear(8, 12), "down1": linear(12, 8), "up2": linear(8, 12), "down2": linear(12, 8)}
    norms = {"norm1": norm(8), "norm2": norm(8)} | ({} if post else {"last": norm(8)})
    return Small(forward, embed=nn.Embedding(9, 8), **mlps, **norms, **({} if tied else {"head": linear(8, 9)}))


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_norms_before_the_layers_are_folded_into_their_readers(norm):
    model = stream(norm)
    used, _ = found(model, tokens())
    assert kinds(used) == {("stream", 1, 8)}
    assert used[0].centred == (norm is nn.LayerNorm)
    assert {fold.norm.gain for fold in used[0].folds} == {model.norm1.weight, model.norm2.weight, model.last.weight}
    assert not used[0].blocking
    for folded in (model.norm1, model.norm2, model.last):
        assert torch.equal(folded.weight, torch.ones(8))


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("uniform", [True, False])
def test_norms_after_the_sum_stop_it_unless_their_gains_are_uniform(norm, uniform):
    model = stream(norm, post=True)
    if uniform:
        nn.init.constant_(model.norm1.weight, 0.7)
        nn.init.ones_(model.norm2.weight)
    used, left = found(model, tokens())
    if uniform:
        assert kinds(used) == {("stream", 1, 8)}
        assert used[0].blocking, "a trained gain would stop it"
    else:
        # The last norm's gain goes into the head, so what comes before it, from the first norm on, is what stops.
        assert not used
        assert any("the gain of norm1.weight is not uniform and cannot be folded" in r for r in reasons(left, "embed"))


@pytest.mark.parametrize("uniform", [True, False])
def test_a_head_tied_to_the_embeddings_needs_a_uniform_last_gain(uniform):
    model = stream(nn.RMSNorm, tied=True)
    if uniform:
        nn.init.constant_(model.last.weight, 1.3)
    used, left = found(model, tokens())
    assert kinds(used) == ({("stream", 1, 8)} if uniform else set())
    if uniform:
        assert used[0].blocking == [model.last.weight]
    else:
        assert any("the gain of last.weight is not uniform and cannot be folded" in r for r in reasons(left, "embed"))


def test_a_norm_between_two_layers_keeps_their_chain():
    used, _ = found(Small(lambda m, x: m.b(m.n(m.a(x))), a=linear(), n=nn.LayerNorm(8), b=linear(8, 3)))
    assert [(s.blocks, s.size, s.centred) for s in used] == [(1, 8, True)]


def test_a_gain_that_is_zero_somewhere_cannot_be_folded():
    model = Small(lambda m, x: m.b(m.n(m.a(x))), a=linear(), n=nn.RMSNorm(8), b=linear(8, 3))
    model.n.weight.data[2] = 0
    used, left = found(model)
    assert not used
    assert any(r.startswith("the gain of n.weight is not uniform and cannot be folded") for r in reasons(left, "a"))


def test_a_norm_of_all_heads_leaves_each_head_its_rotation():
    model = attention(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), norm=nn.LayerNorm(8))
    used, _ = found(model)
    assert kinds(used) == {("query_key", 2, 4), ("value_output", 2, 4)}
    (mixed,) = [s for s in used if s.kind == "value_output"]
    assert mixed.centred
    assert [fold.norm.gain for fold in mixed.folds] == [model.norm.weight]


# --- Attention -----------------------------------------------------------------------------------------------------------


def plain(q, k, v):
    return ((q @ k.mT) * q.shape[-1] ** -0.5).softmax(-1) @ v


def batched(q, k, v):
    flat = [t.reshape(-1, *t.shape[-2:]) for t in (q, k, v)]
    scores = torch.baddbmm(torch.zeros(1, 1, 1), flat[0], flat[1].mT, beta=0)
    return torch.bmm(scores.softmax(-1), flat[2]).view(*q.shape[:-1], -1)


KERNELS = {
    "sdpa": F.scaled_dot_product_attention,
    "sdpa by name": lambda q, k, v: F.scaled_dot_product_attention(query=q, key=k, value=v, is_causal=True),
    "matmul": plain,
    "bmm": batched,
    "transposed": lambda q, k, v: (v.mT @ (k @ q.mT).softmax(-2)).mT,
}


def attention(kernel, heads=2, groups=2, head=4, prepare=lambda t: t, norm=None, output=None):
    """Queries, keys and values of their own weights, with fewer heads of keys and values if there are groups."""

    def forward(m, x):
        q, k, v = (w(x).unflatten(-1, (-1, head)).transpose(1, 2) for w in (m.q, m.k, m.v))
        y = kernel(prepare(q), prepare(k), v).transpose(1, 2).flatten(2)
        return m.o(y if norm is None else m.norm(y))

    members = {} if norm is None else {"norm": norm}
    sizes = {"q": heads * head, "k": groups * head, "v": groups * head}
    return Small(forward, **{name: linear(WIDTH, size) for name, size in sizes.items()}, o=linear(heads * head, 3), **members)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("heads", [1, 2, 3])
def test_attention_with_heads(kernel, heads):
    model = attention(KERNELS[kernel], heads, heads)
    used, _ = found(model)
    assert kinds(used) == {("query_key", heads, 4), ("value_output", heads, 4)}
    parameters = {s.kind: set(s.parameters) for s in used}
    assert parameters["query_key"] == {model.q.weight, model.q.bias, model.k.weight, model.k.bias}
    assert parameters["value_output"] == {model.v.weight, model.v.bias, model.o.weight}


def repeated(repeats):
    return lambda q, k, v: plain(q, k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1))


def expanded(repeats):
    def more(t):
        return t[:, :, None].expand(-1, -1, repeats, -1, -1).reshape(len(t), -1, *t.shape[2:])

    return lambda q, k, v: plain(q, more(k), more(v))


GROUPED = {
    "repeat_interleave": repeated,
    "expand": expanded,
    "enable_gqa": lambda repeats: lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
}


@pytest.mark.parametrize("kernel", GROUPED)
@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (2, 1), (6, 2)])
def test_queries_in_groups_turn_as_their_keys_do(kernel, heads, groups):
    repeats = heads // groups
    model = attention(GROUPED[kernel](repeats), heads, groups)
    used, _ = found(model)
    assert kinds(used) == {("query_key", groups, 4), ("value_output", groups, 4)}
    copies = {part.parameter: part.positions.shape[1] for s in used for part in s.parts}
    assert [copies[p] for p in (model.q.weight, model.k.weight, model.v.weight, model.o.weight)] == [repeats, 1, 1, repeats]


LAYOUTS = {
    "q | k | v": lambda qkv: (t.unflatten(-1, (2, 4)) for t in qkv.chunk(3, -1)),
    "q k v of each head": lambda qkv: qkv.unflatten(-1, (2, 3, 4)).unbind(-2),
    "head after head": lambda qkv: qkv.unflatten(-1, (2, 12)).split(4, -1),
    "interleaved": lambda qkv: qkv.unflatten(-1, (2, 4, 3)).unbind(-1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_queries_keys_and_values_of_one_weight(layout):
    def forward(m, x):
        q, k, v = (t.transpose(1, 2) for t in LAYOUTS[layout](m.qkv(x)))
        return m.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    used, _ = found(Small(forward, qkv=linear(WIDTH, 24), o=linear(8, 3)))
    assert kinds(used) == {("query_key", 2, 4), ("value_output", 2, 4)}


def rotary(t, size=4):
    """Turn pairs of the first features by the token's position."""
    angles = torch.arange(t.shape[-2])[:, None] * torch.tensor([1.0, 0.1, 0.01])[: size // 2]
    cos, sin = (torch.cat([f, f], -1) for f in (angles.cos(), angles.sin()))
    turned, rest = t[..., :size], t[..., size:]
    half = torch.cat([-turned[..., size // 2 :], turned[..., : size // 2]], -1)
    return torch.cat([turned * cos + half * sin, rest], -1)


def test_rotary_embeddings_fix_queries_and_keys():
    used, left = found(attention(F.scaled_dot_product_attention, prepare=rotary))
    assert kinds(used) == {("value_output", 2, 4)}
    assert {s.reason for s in left if s.kind == "query_key"} == {
        "multiplied by a number of its own, as by a rotary embedding or a gate"
    }


def test_rotary_embeddings_of_a_part_leave_the_rest():
    used, left = found(attention(F.scaled_dot_product_attention, head=7, prepare=lambda t: rotary(t, 4)))
    assert kinds(used) == {("value_output", 2, 7), ("query_key", 2, 3)}
    assert {s.size for s in left if s.kind == "query_key"} == {1}


@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
@pytest.mark.parametrize("affine", ["no gain", "uniform gain", "uneven gain"])
def test_norms_of_each_query_and_key(norm, affine):
    model = attention(F.scaled_dot_product_attention)
    own = norm(4, elementwise_affine=affine != "no gain")
    if affine != "no gain":
        nn.init.constant_(own.weight, 0.8)
        own.weight.data[1] += affine == "uneven gain"
    model.own = own
    plain_forward = model.function

    def forward(m, x):
        q, k = m.q.forward, m.k.forward
        m.q.forward = lambda x: m.own(q(x).unflatten(-1, (-1, 4))).flatten(-2)
        m.k.forward = lambda x: m.own(k(x).unflatten(-1, (-1, 4))).flatten(-2)
        try:
            return plain_forward(m, x)
        finally:
            del m.q.forward, m.k.forward

    model.function = forward
    used, left = found(model)
    if affine == "uneven gain":
        assert kinds(used) == {("value_output", 2, 4)}
    if affine == "uneven gain" and norm is nn.RMSNorm:
        uneven = "own.weight is not uniform and scales each feature by its own factor"
        assert {s.reason for s in left if s.kind == "query_key"} == {uneven}
    elif affine != "no gain" and norm is nn.LayerNorm:
        assert kinds(used) == {("value_output", 2, 4)}
        assert {s.reason for s in left if s.size == 4} == {"each head is shifted by the same bias"}
    elif affine != "uneven gain":
        assert kinds(used) == {("query_key", 2, 4), ("value_output", 2, 4)}


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"add_bias_kv": True}, {"kdim": 4, "vdim": 4}])
@pytest.mark.parametrize("need_weights", [False, True])
def test_torch_multi_head_attention(options, need_weights):
    def forward(m, x):
        other = x[..., : options.get("kdim", WIDTH)]
        return m.o(m.attention(x, other, other, need_weights=need_weights)[0])

    model = Small(forward, attention=nn.MultiheadAttention(WIDTH, 2, batch_first=True, **options), o=linear(WIDTH, 3))
    used, _ = found(model)
    assert kinds(used) == {("query_key", 2, 3), ("value_output", 2, 3), ("chain", 1, WIDTH)}


def test_a_product_of_two_towers_turns_both():
    model = Small(lambda m, x: m.a(x).mean(1) @ m.b(x.square()).mean(1).T, a=linear(), b=linear())
    used, _ = found(model)
    assert kinds(used) == {("query_key", 1, 8)}


# --- What looks harmless on one batch, or to a careless follower ----------------------------------------------------------


def table_bias(m):
    positions = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    return (m.e(positions + LENGTH) + m.f(positions.abs())).permute(2, 0, 1)


def heads(m, x):
    return [w(x).unflatten(-1, (2, 4)).transpose(1, 2) for w in (m.q, m.k, m.v)]


def masked_attention(m, x):
    q, k, v = heads(m, x)
    return m.o(F.scaled_dot_product_attention(q, k, v, attn_mask=table_bias(m)).transpose(1, 2).flatten(2))


def added_attention(m, x):
    q, k, v = (t.flatten(0, 1) for t in heads(m, x))
    scores = torch.baddbmm(table_bias(m).repeat(len(x), 1, 1), q, k.mT)
    return m.o((scores.softmax(-1) @ v).unflatten(0, (len(x), 2)).transpose(1, 2).flatten(2))


def written(buffer, x):
    buffer[:] = x
    return buffer


def overwritten(x):
    x = x * 1.0
    x[..., 0] = 5.0
    return x


def scaled_in_part(x):
    x = x * 1.0
    x[..., :2].mul_(3)
    return x


def added_onto(buffer, x):
    return buffer.view(-1, 8).index_add_(0, torch.arange(len(buffer) * LENGTH), x.flatten(0, 1)).view_as(x)


def in_a_buffer(m, x):
    buffer, y = torch.zeros(len(x), LENGTH, 8), m.a(x)
    added_onto(buffer, y)
    return m.c(F.gelu(buffer))


scripted = torch.jit.trace(F.gelu, torch.randn(2))


CARELESS = {
    "setitem of a constant": lambda m, x: m.c(overwritten(m.a(x))),
    "setitem into a buffer": lambda m, x: m.c(m.a(x)) + m.d(F.gelu(written(torch.zeros(len(x), LENGTH, 8), m.a(x)))),
    "a part scaled in place": lambda m, x: m.c(scaled_in_part(m.a(x))),
    "added to a view of a buffer": in_a_buffer,
    "added to a buffer of ones": lambda m, x: m.c(added_onto(torch.ones(len(x), LENGTH, 8), m.a(x))),
    "a weight used plain and scaled": lambda m, x: m.c(m.a(x)) + m.d(F.gelu(F.linear(x, 2 * m.a.weight))),
    "the mean of a weight": lambda m, x: m.c(m.a(x)) + (x * m.a.weight.mean(0)).sum(-1, keepdim=True),
    "a traced function": lambda m, x: m.c(m.a(x)) + m.d(scripted(m.a(x))),
    "a vectorised function": lambda m, x: m.c(torch.vmap(F.gelu)(m.a(x))),
    "through numpy": lambda m, x: m.c(m.a(x)) * float(m.a(x).detach().numpy().max()),
    "as a number": lambda m, x: m.c(m.a(x)) * m.a(x).max().item(),
    "zeros beside features before a norm": lambda m, x: m.d(
        F.layer_norm(torch.cat([m.b(x), 0 * m.z.expand_as(m.b(x))], -1), (8,))
    ),
}


@pytest.mark.parametrize("how", CARELESS)
def test_nothing_turns_that_must_not(how):
    model = Small(CARELESS[how], a=linear(), b=linear(outputs=4), c=linear(8, 3), d=linear(8, 3), z=nn.Parameter(torch.ones(4)))
    used, _ = found(model)
    assert "chain" not in {s.kind for s in used}


@pytest.mark.parametrize("forward", [masked_attention, added_attention])
def test_a_learned_bias_of_the_scores_stays(forward):
    layers = {name: linear() for name in "qkv"}
    model = Small(forward, o=linear(8, 3), e=nn.Embedding(2 * LENGTH, 2), f=nn.Embedding(LENGTH, 2), **layers)
    used, _ = found(model)
    assert kinds(used) == {("query_key", 2, 4), ("value_output", 2, 4)}


def test_rows_of_a_table_that_are_looked_up_and_read_as_features_stay():
    model = Small(lambda m, i: m.u(F.linear(m.e(i), m.e.weight)), e=nn.Embedding(7, 6), u=nn.Linear(7, 3))
    used, left = found(model, torch.randint(0, 7, (3, 5)))
    assert 7 not in {s.size for s in used}
    assert "looked up by token" in {s.reason for s in left}


def test_an_expert_that_the_batch_does_not_reach_keeps_the_stream():
    def forward(m, x):
        y = m.a(x)
        for index in m.reached:
            y = y + m.experts[index](y)
        return m.c(F.rms_norm(y, (8,)))

    experts = nn.ModuleList(nn.Sequential(linear(8, 9), nn.GELU(), linear(9, 8)) for _ in range(2))
    model = Small(forward, a=linear(), c=linear(8, 3), experts=experts)
    model.reached = [0]
    _, left = found(model)
    assert "experts.1.0.weight, which may belong to it, was not used on the teleport data" in {s.reason for s in left}
    model.reached = [0, 1]
    used, _ = found(model)
    assert ("stream", 1, 8) in kinds(used)


def test_a_rotary_embedding_of_a_single_position_is_one_all_the_same():
    used, left = found(attention(F.scaled_dot_product_attention, prepare=rotary), torch.randn(BATCH, 1, WIDTH))
    assert kinds(used) == {("value_output", 2, 4)}
    assert {s.size for s in left if s.kind == "query_key"} == {1}


def test_outputs_and_the_loss_itself_do_not_turn():
    model = Small(lambda m, x: m.a(x) + m.b(x), a=linear(), b=linear())
    symmetries, _ = find_symmetries(model, lambda model, x: model(x).mean((0, 1))[0], sequences())
    assert "it is an output of the model" in {s.reason for s in symmetries}
    assert all(s.reason for s in symmetries)


KEYWORDS = {
    "linear": lambda m, x: F.linear(input=x, weight=m.weight, bias=m.bias),
    "addmm": lambda m, x: torch.addmm(m.bias, mat1=x.flatten(0, 1), mat2=m.weight.T).unflatten(0, x.shape[:2]),
    "matmul": lambda m, x: torch.matmul(input=x, other=m.weight.T),
    "add": lambda m, x: torch.add(input=m(x), other=m(x)),
    "cat": lambda m, x: torch.cat(tensors=[m(x), m(x)], axis=1),
    "reshape": lambda m, x: torch.reshape(input=m(x), shape=(-1, 8)).unflatten(0, x.shape[:2]),
    "mean": lambda m, x: torch.mean(input=m(x), axis=1),
}


@pytest.mark.parametrize("operation", KEYWORDS)
def test_operands_by_name(operation):
    model = Small(lambda m, x: m.c(KEYWORDS[operation](m.a, x)), a=linear(), c=linear(8, 3))
    used, _ = found(model)
    assert {s.size for s in used} == {8}


def test_a_rule_that_cannot_read_a_call_fixes_what_enters_it():
    model = Small(
        lambda m, x: m.c(torch.where(x[..., :1] > 0, input=m.a(x), other=m.b(x))), a=linear(), b=linear(), c=linear(8, 3)
    )
    used, _ = found(model)
    assert not used
