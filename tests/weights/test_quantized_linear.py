"""Linear layers in 8 and 4 bits: what is stored, and kernels beside the product with its numbers."""
import pytest
import torch
from torch import Tensor, nn

from weights.quantized_linear import (
    GROUPS,
    Int4Linear,
    Int8Linear,
    QuantizedLinear,
    by_torch,
    cpu_block,
    in_blocks,
    packed_for_cpu,
)

CPU = torch.device("cpu")
KINDS = Int8Linear, Int4Linear
DTYPES = torch.bfloat16, torch.float16, torch.float32
SHAPES = (64, 64), (48, 96), (144, 160), (16, 32), (208, 1024)          # N, K: whole blocks of rows and parts
BOUND = {"int8": 0.01, "int4": 0.11}                                    # of the error of Gaussian weights


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(kind: type[QuantizedLinear], weight: Tensor, dtype: torch.dtype = torch.float32,
         bias: bool = False) -> QuantizedLinear:
    like = nn.Linear(weight.shape[1], len(weight), bias=bias).to(dtype).requires_grad_(False)
    layer = kind(like)
    layer.fill(kind.rounded(weight.to(dtype), dtype), CPU, dtype)
    return layer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_multiply_with_what_is_stored(kind, dtype, shape):
    weight = gaussian(*shape).to(dtype)
    numbers = kind.numbers({name: part.float() if part.is_floating_point() else part
                            for name, part in kind.rounded(weight, dtype).items()})
    assert (numbers - weight.float()).norm() <= BOUND[kind.kind] * weight.float().norm()
    layer = made(kind, weight, dtype)
    for batch in (), (0,), (1,), (2, 3), (1, 9), (0, 4), (40,), (2, 70):      # few positions, and many
        x = gaussian(*batch, shape[1], seed=1).to(dtype)
        y = layer(x)
        expected = x.double() @ numbers.double().T
        assert y.dtype == dtype and y.shape == expected.shape
        assert (y - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_view_of_any_layout_is_multiplied(kind):
    layer = made(kind, gaussian(32, 64))
    x = gaussian(5, 64, 3).transpose(1, 2)
    torch.testing.assert_close(layer(x), layer(x.contiguous()))
    torch.testing.assert_close(layer(gaussian(1, 64).expand(4, -1)), layer(gaussian(1, 64)).expand(4, -1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_bias_is_added(kind):
    layer = made(kind, gaussian(32, 64), bias=True)
    x = gaussian(3, 64, seed=1)
    with_bias = layer(x)
    bias, layer.bias = layer.bias, None
    torch.testing.assert_close(with_bias, layer(x) + bias)


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_products_of_many_positions_are_those_of_few(kind, slow, monkeypatch):
    monkeypatch.setattr("weights.quantized_linear.is_slow", lambda dtype, device: slow)
    monkeypatch.setattr("weights.quantized_linear.PART", 128 * 96)
    layer = made(kind, gaussian(320, 96), torch.bfloat16)
    x = gaussian(kind.many, 96, seed=1).bfloat16()
    expected = layer.product(x)
    assert (layer(x) - expected).norm() < 5e-3 * expected.norm()


def test_int8_by_hand():
    stored = Int8Linear.rounded(torch.tensor([[1.0, -2.0, 0.4] + [0.0] * 13, [0.0] * 16]), torch.float32)
    assert stored["weight"].tolist() == [[64, -127, 25] + [0] * 13, [0] * 16]       # 63.5 is rounded to even
    torch.testing.assert_close(stored["scale"], torch.tensor([2 / 127, 0.0]))
    assert not Int8Linear.numbers(stored)[1].any()


def test_int4_by_hand():
    """A group from -3 to 12 has steps of 1; groups of equal weights are exact."""
    one = torch.cat((torch.arange(16).repeat(2) - 3.0, torch.full((32,), 0.7), torch.zeros(32)))
    weight = one.repeat(16, 1)
    stored = Int4Linear.rounded(weight, torch.float32)
    assert stored["weight"][3, :3].tolist() == [0x01, 0x23, 0x45] and stored["scale"].shape == (3, 16, 2)
    assert stored["scale"][:2, 5].flatten().tolist() == pytest.approx([1.0, 5.0, 0.0, 0.7])
    torch.testing.assert_close(Int4Linear.numbers(stored), weight)
    x = gaussian(2, 96)
    torch.testing.assert_close(made(Int4Linear, weight)(x), x @ weight.T)


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_in_parts_is_rounding_at_once(kind, monkeypatch):
    weight = gaussian(48, 64)
    whole = kind.rounded(weight, torch.bfloat16)
    monkeypatch.setattr("weights.quantized_linear.AT_ONCE", 5 * 64)
    for name, part in kind.rounded(weight, torch.bfloat16).items():
        assert torch.equal(part, whole[name])


def test_wide_layers_have_long_groups():
    for inputs, groups in (1024, 8), (512, 16), (1056, 33):             # 128 does not divide the last
        assert Int4Linear.rounded(gaussian(16, inputs), torch.float32)["scale"].shape == (groups, 16, 2)


@pytest.mark.parametrize("shape, eight, four", [((64, 64), True, True), ((5, 48), True, False),
                                                 ((64, 40), False, False), ((24, 64), True, False)])
def test_which_shapes_fit(shape, eight, four):
    assert (Int8Linear.fits(list(shape)), Int4Linear.fits(list(shape))) == (eight, four)


def test_which_parts_belong_together():
    assert Int8Linear.belong([5, 16], [5]) and not Int8Linear.belong([5, 16], [4])
    for group in GROUPS:
        assert Int4Linear.belong([16, 128], [256 // group, 16, 2])
    assert not Int4Linear.belong([16, 128], [3, 16, 2]) and not Int4Linear.belong([16, 128], [8, 2, 16])


@pytest.mark.parametrize("rows", [16, 64, 96, 208])
def test_packing_is_that_of_torch(rows):
    codes = torch.randint(256, (rows, 32), dtype=torch.uint8)
    assert torch.equal(packed_for_cpu(codes), by_torch(codes))


def test_another_way_of_packing_is_noticed(monkeypatch):
    """Where torch packs in a way that is not known here, it does so itself."""
    codes = torch.randint(256, (64, 32), dtype=torch.uint8)
    expected = by_torch(codes)
    other = lambda codes, block: in_blocks(codes, block) + 1                                # noqa: E731
    monkeypatch.setattr("weights.quantized_linear.in_blocks", other)
    cpu_block.cache_clear()
    assert cpu_block() is None and torch.equal(packed_for_cpu(codes), expected)
    cpu_block.cache_clear()


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradients(kind):
    layer = made(kind, gaussian(32, 64))
    x = gaussian(2, 64).requires_grad_(True)
    with pytest.raises(ValueError, match="no gradients.*inference_mode.*without quantize"):
        layer(x)
    with torch.no_grad():
        assert not layer(x).requires_grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_no_number(kind, bad):
    weight = gaussian(32, 64)
    weight[3, 5] = bad
    y = made(kind, weight)(torch.ones(1, 64))[0]
    assert not y[3].isfinite() and y[4:].isfinite().all()
