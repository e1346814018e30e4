"""Which heads AGOP takes: chains in any dress, the protocol, autograd for the rest; which it refuses, and how."""

from __future__ import annotations

import pytest
import torch
from agop_heads import chain, jacrev_agop, module_agop
from strategies import ACTIVATIONS
from torch import nn

from mmc_fast.agop.accumulator import AGOPAccumulator, agop
from mmc_fast.agop.head import linear_chain
from mmc_fast.errors import InputError
from mmc_fast.testing import relative_error


class TokenAttention(nn.Module):
    """Attention over the tokens of one sample: rows of the batch stay apart."""

    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.out = nn.Linear(12, 3)

    def forward(self, x):
        tokens = x.reshape(len(x), 3, 4)
        return self.out(self.attend(tokens, tokens, tokens, need_weights=False)[0].reshape(len(x), 12))


class BatchAttention(nn.Module):
    def forward(self, x):
        return torch.softmax(x @ x.t(), dim=1) @ x


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(x + torch.tanh(self.inner(x)))


class Listed(nn.Module):
    """A custom head that names its layers; ``scale`` breaks the promise."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.first, self.second, self.scale = nn.Linear(6, 9), nn.Linear(9, 3), scale

    def agop_layers(self):
        return [self.first, nn.GELU(), self.second]

    def forward(self, x):
        return self.scale * self.second(nn.functional.gelu(self.first(x)))


@pytest.mark.parametrize("output", ["logits", "probs"])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of the truth, in torch.func
def test_any_other_module_by_autograd(output, center, generator):
    torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
    normalised = nn.Sequential(nn.Linear(12, 8), nn.LayerNorm(8), nn.ReLU(inplace=True), nn.Linear(8, 3))
    batch_norm = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).eval()
    x = torch.randn(70, 12, generator=generator)
    for head in (TokenAttention(), normalised, batch_norm):
        accumulator = AGOPAccumulator(head, output=output, center=center, chunk_size=64).update(x)
        result = accumulator.compute()
        assert result.method == "vector-Jacobian products"
        truth = module_agop(head, x, output, center)
        assert relative_error(result.matrix, truth) < 1e-5
        assert relative_error(agop(head, x.double(), output=output, center=center, precision="float64"), truth) < 1e-6
        assert all(parameter.grad is None for parameter in head.parameters())


def test_a_head_may_return_one_number_per_sample(generator):
    class Energy(nn.Module):
        def forward(self, x):
            return x.pow(3).sum(dim=1)

    x = torch.randn(20, 4, generator=generator)
    rows = 3 * x.double() ** 2
    assert relative_error(agop(Energy(), x), rows.t() @ rows) < 1e-6
    assert agop(Energy(), x.double()).dtype == torch.float64


def test_a_lone_activation_is_a_module_like_any_other():
    assert agop(nn.Sequential(nn.ReLU()), torch.ones(4, 3)).tolist() == (4 * torch.eye(3)).tolist()


def test_layers_by_name_and_the_heads_own_input(generator):
    head = Residual()
    x = torch.randn(50, 6, generator=generator)
    assert relative_error(agop(head, x), module_agop(head, x)) < 1e-6
    assert AGOPAccumulator(head).update(x).compute().layer == 0
    assert relative_error(agop(head, x, layer="input"), module_agop(head, x)) < 1e-6
    with torch.no_grad():
        u = x + torch.tanh(head.inner(x))
    assert relative_error(agop(head, x, layer="last"), module_agop(head.last, u)) < 1e-6
    # at the inner Linear's input the skip path is not part of the Jacobian
    inner = torch.func.vmap(torch.func.jacrev(lambda v, r: head.last(r + torch.tanh(head.inner(v)))))(x, x).flatten(
        0, 1
    )
    for options in ({}, {"precision": "float64"}):
        assert relative_error(agop(head, x, layer="inner", **options), (inner.t() @ inner).detach()) < 1e-6
    sequential = chain([6, 8, 3], "relu", generator)
    assert torch.equal(agop(sequential, x, layer="2"), agop(sequential, x, layer=1))
    shifted = nn.Sequential(nn.Tanh(), *chain([6, 8, 3], "silu", generator))
    assert relative_error(agop(shifted, x), jacrev_agop(shifted, x)) < 2e-6  # at the Linear's input
    assert relative_error(agop(shifted, x, layer="input"), module_agop(shifted, x)) < 2e-6


def test_a_norm_before_the_layer_keeps_the_closed_form(generator):
    head = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 20), nn.GELU(), nn.Linear(20, 3))
    x = torch.randn(90, 6, generator=generator)
    result = AGOPAccumulator(head).update(x).compute()
    assert result.method == "derivative Gram"
    assert relative_error(result.matrix, jacrev_agop(head, x)) < 2e-6


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "gelu"])
@pytest.mark.parametrize("center", [False, True])
def test_linear_layers_with_nothing_between_them(activation, center, generator):
    a, b = chain([6, 7, 9], "identity", generator), chain([9, 5, 3], "identity", generator)
    head = nn.Sequential(*a, ACTIVATIONS[activation](), *b).double()
    x = torch.randn(90, 6, generator=generator, dtype=torch.float64)
    for layer in range(4):
        truth = jacrev_agop(head, x, layer, center=center)
        torch.testing.assert_close(agop(head, x, layer=layer, center=center), truth, rtol=1e-9, atol=1e-9)


def test_the_protocol_of_custom_heads(generator):
    x = torch.randn(40, 6, generator=generator)
    head = Listed()
    result = AGOPAccumulator(head, center=True).update(x).compute()
    assert result.method == "derivative Gram"
    assert relative_error(result.matrix, module_agop(head, x, center=True)) < 3e-6
    with pytest.raises(InputError, match=r"agop_layers\(\) does not compute what the head computes"):
        agop(Listed(scale=2.0), x)
    with pytest.raises(InputError, match="does not compute"):
        agop(Listed(scale=1 + 1e-9).double(), x.double())
    assert AGOPAccumulator(Listed(scale=1 + 1e-6)).update(x).n == 40, "rounding in float32"


def test_nesting_dropout_identity_inplace_and_subclasses(generator):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    x = torch.randn(60, 6, generator=generator)
    before = x.clone()
    plain = chain([6, 9, 8, 3], "relu", generator)
    nested = nn.Sequential(
        nn.Identity(), nn.Sequential(plain[0], nn.Dropout(0.5)), nn.ReLU(inplace=True), plain[2], nn.Sequential(),
        nn.ReLU(inplace=True), nn.Sequential(nn.Sequential(plain[4])), nn.Dropout(0.0),
    ).eval()  # fmt: skip
    for layer in (0, 1, 2):
        assert torch.equal(agop(nested, x, layer=layer), agop(plain, x, layer=layer))
    assert torch.equal(agop(nn.Sequential(*plain, nn.Dropout(0.0)).train(), x), agop(plain, x))
    two = nn.Sequential(nn.ReLU(inplace=True), plain[0], nn.Tanh(), nn.ELU(), nn.Linear(9, 3))
    assert relative_error(agop(two, x), jacrev_agop(two, x.clone())) < 2e-6
    custom = nn.Sequential(plain[0], nn.ReLU(), Doubled(9, 3))
    assert relative_error(agop(custom, x), module_agop(custom, x)) < 2e-6
    hooked = chain([6, 9, 3], "relu", generator)
    hooked[1].register_forward_hook(lambda module, args, y: 3 * y)
    assert relative_error(agop(hooked, x), module_agop(hooked, x)) < 2e-6
    weighted = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 9)), nn.GELU(), nn.Linear(9, 3))
    assert relative_error(agop(weighted, x), module_agop(weighted, x)) < 2e-6
    assert torch.equal(x, before)
    assert linear_chain(nested[1:]) == [leaf for leaf in nested[1:].modules() if not isinstance(leaf, nn.Sequential)]
    assert [linear_chain(head) for head in (None, nn.Sequential(), two, custom, hooked)] == [None] * 5


@pytest.mark.parametrize("threshold", [0.5, 20])
@pytest.mark.parametrize("center", [False, True])
def test_softplus_is_linear_above_its_own_threshold(threshold, center, generator):
    head = nn.Sequential(nn.Linear(5, 9), nn.Softplus(1.5, threshold), nn.Linear(9, 3))
    x = 9 * torch.randn(90, 5, generator=generator)
    x = x[((1.5 * head[0](x) - threshold).abs() > 1e-4).all(1)]
    assert relative_error(agop(head, x, center=center), jacrev_agop(head, x, center=center)) < 3e-6


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)), "BatchNorm1d. normalises with the"),
        (nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Linear(8, 3)), "head.1 .Dropout, p=0.3. is in"),
        (nn.Sequential(nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 3)).eval(), "statistics of"),
        (BatchAttention(), "BatchAttention. gave other outputs for rows 1"),
        (nn.Sequential(BatchAttention(), nn.Linear(6, 3)), "the part before the layer gave other outputs"),
        (nn.Sequential(nn.Linear(6, 6), BatchAttention()), "gave other outputs for rows 1"),
        (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(9, 3)), r"weight\[1\] has 9 columns but"),
        (nn.Sequential(nn.Linear(5, 3)), "inputs have 6 columns but the head's first Linear takes 5"),
        (nn.Flatten(0), "it must return .samples, outputs."),
    ],
)  # fmt: skip
def test_heads_that_have_no_jacobian_per_sample(head, message, generator):
    x = torch.randn(9, 6, generator=generator)
    x[2] = 0
    for rows in (x, x[:1], x[2:]):
        with pytest.raises(InputError, match=message) as caught:
            agop(head, rows)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layer": 2}, InputError, "layer=2 but the head has 2 Linear layer.s.; allowed are -2..1"),
        ({"layer": -3}, InputError, "allowed are -2..1"),
        ({"layer": 1.0}, TypeError, "layer is float"),
        ({"layer": "nope"}, InputError, "no module named 'nope'"),
        ({"output": "prob"}, InputError, "output='prob'; allowed are 'logits', 'probs'"),
        ({"reduction": "avg"}, InputError, "reduction='avg'"),
        ({"backend": "gpu"}, InputError, "backend='gpu'"),
        ({"backend": "cuda"}, RuntimeError, "cuda"),
        ({"precision": "fp8"}, InputError, "precision='fp8'"),
        ({"probes": 0}, InputError, "probes=0; pass an integer >= 1"),
        ({"probes": True}, InputError, "probes=True"),
        ({"chunk_size": -1}, InputError, "chunk_size=-1"),
        ({"memory_budget": 0}, InputError, "memory_budget=0"),
        ({"seed": "a"}, InputError, "seed='a'"),
    ],
)
def test_bad_options_are_one_clear_line(options, error, message, generator):
    with pytest.raises(error, match=message) as caught:
        agop(chain([6, 8, 3], "relu", generator), torch.randn(9, 6, generator=generator), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (torch.zeros(6), InputError, r"inputs have shape \[6\]"),
        (torch.zeros(2, 3, 6), InputError, r"inputs have shape \[2, 3, 6\]"),
        (torch.zeros(4, 6, dtype=torch.int64), InputError, "inputs are torch.int64"),
        (torch.zeros(4, 7), InputError, "inputs have 7 columns but the head's first Linear takes 6"),
        (3, TypeError, "inputs are int"),
        ([(torch.zeros(4, 6), 1)], TypeError, "the iterable gave tuple"),
    ],
)
def test_bad_inputs_are_one_clear_line(inputs, error, message, generator):
    head = chain([6, 8, 3], "relu", generator)
    accumulator = AGOPAccumulator(head)
    with pytest.raises(error, match=message):
        accumulator.update(inputs)
    assert accumulator.n == 0
    with pytest.raises(TypeError, match="head is function"):
        agop(lambda x: x, torch.zeros(4, 6))


def test_mean_of_nothing_and_blocks_that_do_not_fit(generator):
    head = chain([6, 8, 3], "relu", generator)
    with pytest.raises(InputError, match="reduction='mean' over 0 samples"):
        agop(head, torch.zeros(0, 6), reduction="mean")
    with pytest.raises(InputError, match="add up to 5 but the layer's input has width 6"):
        AGOPAccumulator(head, blocks={"image": 2, "audio": 3})
    with pytest.raises(InputError, match="block 'image' has width -2"):
        AGOPAccumulator(head, blocks={"image": -2, "audio": 8})
    with pytest.raises(InputError, match="no data yet"):
        AGOPAccumulator(Residual()).compute()


def test_a_custom_heads_buffers_stay_as_they_are(generator):
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 2)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return torch.tanh(self.inner(x))

    head = Counter()
    accumulator = AGOPAccumulator(head, chunk_size=64)
    accumulator.update(torch.randn(200, 4, generator=generator)).compute()
    assert float(head.calls) == 0
