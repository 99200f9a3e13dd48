"""Philox4x32-7: Random123's known answers, its avalanche, and the layout of an operand's draws."""

from __future__ import annotations

import itertools

import pytest
import torch
from common import refuses

import mxtrain.reference as ref

KNOWN_ANSWERS = [  # Random123, tests/kat_vectors: counter, key, output of 7 rounds, of 10
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "5f6fb709 0d893f64 4f121f81 4f730a48",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "5207ddc2 45165e59 4d8ee751 8c52f662",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "4dfccaba 190a87f0 c47362ba b6b5242a",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def scalar_philox(counter: list[int], key: list[int]) -> list[int]:
    """The generator once more, in Python integers."""
    c, k = list(counter), list(key)
    for _ in range(7):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [
            (p1 >> 32) ^ c[1] ^ k[0],
            p1 & 0xFFFFFFFF,
            (p0 >> 32) ^ c[3] ^ k[1],
            p0 & 0xFFFFFFFF,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


@pytest.mark.parametrize(("counter", "key", "seven", "ten"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, seven: str, ten: str) -> None:
    c = [torch.tensor([w]) for w in words(counter)]
    k = [torch.tensor([w]) for w in words(key)]
    assert [int(w) for w in ref.philox4x32(c, k)] == words(seven)
    assert [int(w) for w in ref.philox4x32(c, k, rounds=10)] == words(ten)
    assert scalar_philox(words(counter), words(key)) == words(seven)


def flips(bit: int, rounds: int) -> torch.Tensor:
    """Of 4096 counters and keys: how often each of 128 output bits changes with input bit `bit`."""
    generator = torch.Generator().manual_seed(bit)
    inputs = list(torch.randint(0, 2**32, (6, 4096), generator=generator))
    inputs[0] &= 0xFFFFF  # the groups of a matrix: small numbers
    inputs[1], inputs[3] = torch.zeros_like(inputs[1]), inputs[3] & 1
    other = list(inputs)
    other[bit // 32] = other[bit // 32] ^ (1 << bit % 32)
    a, b = (torch.stack(ref.philox4x32(t[:4], t[4:], rounds)) for t in (inputs, other))
    return ((a ^ b)[..., None] >> torch.arange(32) & 1).sum(1).flatten()


def test_avalanche() -> None:
    """An input bit changes each output bit in half of the cases: 24,576 binomials of 4096 within
    six standard deviations (false failure: 5e-5). Four rounds are too few for that.
    """
    changes = torch.stack([flips(bit, 7) for bit in range(192)])
    assert ((changes - 2048).abs() <= 6 * 32).all()
    assert not ((flips(0, 4) - 2048).abs() <= 6 * 32).all()


def test_random_counters_match_the_scalar_generator() -> None:
    generator = torch.Generator().manual_seed(21)
    inputs = torch.randint(0, 2**32, (100, 6), generator=generator)
    out = torch.stack(ref.philox4x32(list(inputs[:, :4].T), list(inputs[:, 4:].T)), dim=1)
    for given, got in zip(inputs.tolist(), out.tolist(), strict=True):
        assert got == scalar_philox(given[:4], given[4:])


@pytest.mark.parametrize(
    ("seed", "offset", "stream"),
    [(0, 0, 0), (0x123456789ABCDEF0, 7, 1), (-3, -1, 0), (2**63 - 1, 2**40 + 5, 1)],
)
def test_draws_of_an_operand(seed: int, offset: int, stream: int) -> None:
    rows, cols, groups = 5, 48, 2  # a row's last group is half used
    draws = ref.draws(torch.tensor([seed, offset]), rows, cols, stream)
    assert draws.shape == (rows, cols) and draws.dtype == torch.int64
    key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for r in range(rows):
        for k in range(cols):
            w = scalar_philox([r * groups + k // 32, 0, offset & 0xFFFFFFFF, stream], key)
            assert int(draws[r, k]) == scalar_draw(w, k % 32)


def rot16(w: int) -> int:
    return (w & 0xFFFF) << 16 | w >> 16


def scalar_draw(w: list[int], j: int) -> int:
    """Draw j of 32, by the definition of docs/numerics.md."""
    c = [0, rot16(w[0] ^ w[1]), rot16(w[2] ^ w[3])]
    word = w[j % 8 // 2] ^ [*c, c[1] ^ c[2]][j // 8]
    return word >> 16 if j % 2 else word & 0xFFFF


def rank(rows: list[int]) -> int:
    """Of a matrix over GF(2), a row an integer."""
    pivots: dict[int, int] = {}
    for row in rows:
        while row and row.bit_length() in pivots:
            row ^= pivots[row.bit_length()]
        if row:
            pivots[row.bit_length()] = row
    return len(pivots)


def test_any_three_draws_of_a_group_are_independent() -> None:
    """A draw is 16 linear forms of the 128 output bits; those of any three draws have rank 48.

    So the 128 bits being uniform, any three draws are uniform and independent, exactly.
    """
    bits = torch.arange(128)
    units = [torch.where(bits // 32 == t, 1 << (bits % 32), 0) for t in range(4)]
    columns = ref.draws_of_words(units)  # [128, 32]: what each bit flips
    assert columns.shape == (128, 32)
    forms = [
        [sum(1 << i for i in range(128) if int(columns[i, j]) >> b & 1) for b in range(16)]
        for j in range(32)
    ]
    assert all(rank(form) == 16 for form in forms)
    for a, b, c in itertools.combinations(range(32), 3):
        assert rank(forms[a] + forms[b] + forms[c]) == 48
    # and no more than three: the four words of two quarters are not
    assert rank(forms[0] + forms[2] + forms[8] + forms[10]) == 48


def test_the_map_of_draws_is_linear() -> None:
    generator = torch.Generator().manual_seed(5)
    a, b = (list(torch.randint(0, 2**32, (4, 500), generator=generator)) for _ in range(2))
    both = ref.draws_of_words([x ^ y for x, y in zip(a, b, strict=True)])
    assert torch.equal(both, ref.draws_of_words(a) ^ ref.draws_of_words(b))


def test_rounding_errors_of_a_group_do_not_correlate() -> None:
    """Of 32 values a quarter of the way between two integers, 2^18 groups.

    The 496 correlations are those of independent draws: normal, of deviation 2^-9; one beyond 8
    deviations has a probability under 1e-12 in all. The variance of their sum is 32 times 3/16,
    its estimate good to 2^-8.5; 8 deviations again.
    """
    groups = 2**18
    draws = ref.draws(torch.tensor([11, 3]), groups, 32, 0)
    up = (2 * draws + 1 < 0.25 * 2**17).double()
    error = (up - 0.25) / (3 / 16) ** 0.5
    correlation = error.T @ error / groups
    off = correlation - torch.diag(torch.diag(correlation))
    assert float(off.abs().max()) < 8 * 2.0**-9
    assert abs(float(error.sum(1).var()) / 32 - 1) < 8 * 2.0**-8.5


def test_draws_are_uniform_and_streams_differ() -> None:
    first = ref.draws(torch.tensor([5, 0]), 256, 1024, 0)
    others = [
        ref.draws(torch.tensor([5, 0]), 256, 1024, 1),
        ref.draws(torch.tensor([5, 1]), 256, 1024, 0),
        ref.draws(torch.tensor([6, 0]), 256, 1024, 0),
    ]
    n = first.numel()
    for other in others:
        # each of the n pairs agrees with probability 2^-16: mean 4, and P(Poisson(4) > 40) < 1e-25
        assert int((first == other).sum()) <= 40
    counts = torch.bincount(first.flatten() >> 8, minlength=256).double()
    chi2 = float(((counts - n / 256) ** 2 / (n / 256)).sum())
    # chi-squared, 255 degrees of freedom: 10 standard deviations, p < 1e-15
    assert abs(chi2 - 255) < 10 * (2 * 255) ** 0.5


def test_bad_arguments_raise() -> None:
    with refuses(ValueError, match="rng must be int64"):
        ref.draws(torch.tensor([1.0, 2.0]), 1, 8, 0)
    with refuses(ValueError, match="rng must be int64"):
        ref.draws(torch.tensor([1]), 1, 8, 0)
