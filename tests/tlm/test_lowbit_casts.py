"""Numbers of 8 bits and fewer: bit by bit against torch's own types, block by block against loops, odd inputs."""

import itertools
import math

import pytest
import torch

from tlm.lowbit.philox import philox, uniforms
from tlm.lowbit.quantise import (
    E4M3,
    E5M2,
    INT8,
    ROW,
    TENSOR,
    TINY,
    Cast,
    binary,
    next_power_of_two,
    ternary,
)

FORMATS = {"e4m3": E4M3, "e5m2": E5M2, "int8": INT8}


def numbers(rows, columns, seed=0):
    """Normal numbers of magnitudes from 1e-4 to 1e4, a row of zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    x = x * 10 ** (torch.rand(rows, columns, generator=generator) * 8 - 4)
    x[rows // 2] = 0
    return x


def values_of(dtype):
    """Every finite number of an 8-bit type, in float32."""
    every = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    return every[every.isfinite()].unique()


@pytest.mark.parametrize("name", FORMATS)
def test_a_cast_gives_the_nearest_number_of_the_format_ties_to_even(name):
    """Among all numbers that torch's type has, by distance in float64; the scale is 1 as the largest is among them."""
    form = FORMATS[name]
    known = values_of(form.dtype).double()
    known = known[known.abs() <= form.largest]
    middles = (known[1:] + known[:-1]) / 2
    x = torch.cat([known, middles, middles.float().nextafter(torch.tensor(torch.inf)).double(), known * 0.999])
    cast = Cast(form, TENSOR)(x.float()[None])
    assert cast.values.dtype == form.dtype
    assert cast.scales.tolist() == [[1.0]]
    distance = (x.float().double()[:, None] - known).abs()
    least = distance.amin(1)
    found = cast.values.double()[0]
    assert torch.equal((x.float().double() - found).abs(), least)
    tied = (distance == least[:, None]).sum(1) == 2
    assert tied.sum() >= len(middles) - 2
    bits = cast.values[0].view(torch.uint8)
    assert not (bits[tied] & 1).any()  # the even one of two neighbours


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_values_are_those_of_torch_bit_by_bit(name):
    form, x = FORMATS[name], numbers(70, 90)
    cast = Cast(form, ROW)(x)
    for row, scale, values in zip(x, cast.scales[:, 0], cast.values, strict=True):
        assert scale == max(row.abs().max() / form.largest, torch.tensor(TINY))
        assert torch.equal((row / scale).to(form.dtype).view(torch.uint8), values.view(torch.uint8))


BLOCKS = [TENSOR, ROW, (1, 128), (128, 128), (1, 32), (3, 5)]


@pytest.mark.parametrize(("form", "block"), itertools.product(FORMATS.values(), BLOCKS))
def test_blocks_against_a_loop_by_hand(form, block):
    """Odd shapes: most blocks at the edges are cut short."""
    x = numbers(130, 161)
    cast = Cast(form, block)(x)
    rows, columns = block[0] or 130, block[1] or 161
    assert cast.scales.shape == (math.ceil(130 / rows), math.ceil(161 / columns))
    back = cast.dequantised()
    for (i, top), (j, left) in itertools.product(enumerate(range(0, 130, rows)), enumerate(range(0, 161, columns))):
        part = slice(top, top + rows), slice(left, left + columns)
        scale = torch.clamp(x[part].abs().max() / form.largest, min=TINY)
        scaled = (x[part] / scale).clamp(-form.largest, form.largest)
        values = (scaled.round() if form is INT8 else scaled).to(form.dtype)
        assert cast.scales[i, j] == scale
        assert torch.equal(cast.values[part].float(), values.float())
        assert torch.equal(back[part], values.float() * scale)


def test_weights_in_square_blocks_turn_with_the_matrix():
    x = numbers(130, 161)
    cast, turned = Cast(E4M3, (128, 128))(x), Cast(E4M3, (128, 128))(x.T)
    assert torch.equal(cast.dequantised().T, turned.dequantised())


def test_power_of_two_scales_are_those_of_e8m0_and_cut_nothing_off():
    scales = torch.tensor([TINY, 1.0, 1.0000001, 1.5, 2.0, 0.7, 3e38 / 448, 2.0**100])
    assert next_power_of_two(scales).tolist() == [2.0 ** math.ceil(math.log2(s)) for s in scales.double().tolist()]
    x = numbers(64, 96)
    cast = Cast(E4M3, (1, 32), power_of_two=True)(x)
    assert torch.equal(cast.scales.to(torch.float8_e8m0fnu).float(), cast.scales)
    plain = Cast(E4M3, (1, 32))(x).scales
    assert ((cast.scales >= plain) & ((cast.scales < 2 * plain) | (plain == TINY))).all()


def test_odd_inputs_follow_the_policy():
    """Zeros come out as zeros; infinity and NaN make their block NaN, and no other."""
    x = torch.ones(4, 64)
    x[0, 3], x[1, 40], x[2] = torch.inf, torch.nan, 0.0
    x[3, :32] = 1e-42  # denormals: too small for a scale
    for form, power in itertools.product(FORMATS.values(), (False, True)):
        cast = Cast(form, (1, 32), power)(x)
        back = cast.dequantised()
        assert cast.scales.isnan().tolist() == [[True, False], [False, True], [False, False], [False, False]]
        assert torch.equal(back.isnan(), cast.scales.isnan().repeat_interleave(32, 1))
        assert (cast.scales[2] == TINY).all()
        assert (back[2] == 0).all()
        assert (back[3, :32].abs() < TINY).all()
        assert torch.allclose(back[3, 32:], torch.ones(32), rtol=0.07)
    for quantise in (ternary, binary):
        assert quantise(x).dequantised().isnan().all()
        assert (quantise(torch.zeros(3, 5)).dequantised().abs() <= TINY).all()


def test_ternary_and_binary_by_hand():
    w = torch.tensor([[0.9, -0.1, 0.02], [-1.4, 0.3, -0.6]])
    mean = (0.9 + 0.1 + 0.02 + 1.4 + 0.3 + 0.6) / 6  # 0.5533
    assert ternary(w).values.tolist() == [[1, 0, 0], [-1, 1, -1]]
    assert binary(w).values.tolist() == [[1, 1, 1], [-1, 1, -1]]  # above the mean weight of -0.147
    for quantise in (ternary, binary):
        assert quantise(w).scales.item() == pytest.approx(mean)


# Of Random123, tests/kat_vectors: counter, key, words of Philox 4x32-10.
KNOWN = [
    ([0, 0, 0, 0], (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([2**32 - 1] * 4, (2**32 - 1, 2**32 - 1), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        (0xA4093822, 0x299F31D0),
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_the_published_words(counter, key, words):
    assert [int(word) for word in philox([torch.tensor(c) for c in counter], key)] == words


def test_random_numbers_are_uniform_and_depend_on_seed_and_place_alone():
    a = uniforms(7, torch.Size((1001, 50)))
    assert torch.equal(a.flatten()[:203], uniforms(7, torch.Size((7, 29))).flatten())
    assert not torch.equal(a, uniforms(8, torch.Size((1001, 50))))
    assert not torch.equal(a, uniforms(7 + 2**32, torch.Size((1001, 50))))
    assert 0 <= a.min() <= a.max() < 1
    counts = torch.histc(a, 20, 0, 1)
    assert ((counts - 2502.5) ** 2 / 2502.5).sum() < 44  # chi-squared of 19 degrees of freedom: 0.1%


def test_stochastic_rounding_has_the_right_mean_and_keeps_what_is_exact():
    x = torch.full((4000, 64), 0.0)
    x[:, 0], x[:, 1:] = 127.0, torch.linspace(-126.9, 126.9, 63)
    noise = uniforms(3, x.shape)
    rounded = Cast(INT8, TENSOR)(x, noise).dequantised()
    assert (rounded[:, 0] == 127).all()
    assert ((rounded - x).abs() < 1).all()
    assert (rounded.mean(0) - x[0]).abs().max() < 4 * 0.5 / 4000**0.5
    assert (Cast(INT8, TENSOR)(x).dequantised().mean(0) - x[0]).abs().max() > 0.4  # nearest is biased
    whole = x.round()
    assert torch.equal(Cast(INT8, TENSOR)(whole, noise).dequantised(), whole)
