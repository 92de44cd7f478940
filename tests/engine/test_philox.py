"""Philox4x32-10 gives the published numbers, and uniforms are a function of (seed, stream, position)."""

import numpy as np
import pytest

from engine.philox import philox4x32, uniforms

SEEDS = np.array([0, 1, 2, 2**32, 2**63, 2**64 - 1], np.uint64)


def words(*values):
    return tuple(np.array([value], np.uint64) for value in values)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        # tests/kat_vectors of Random123, the authors' implementation.
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter, key, expected):
    assert tuple(int(word[0]) for word in philox4x32(words(*counter), words(*key))) == expected


def grid(num_positions):
    """Every (seed, stream, position) of a small grid, flat."""
    axes = SEEDS, np.arange(5, dtype=np.uint64), np.arange(num_positions, dtype=np.uint64)
    return [axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")]


def test_each_seed_stream_and_position_draws_a_number_of_its_own():
    numbers = uniforms(*grid(200))
    assert len(np.unique(numbers)) == len(numbers)


def test_a_number_does_not_depend_on_what_is_drawn_beside_it():
    seeds, streams, positions = grid(7)
    together = uniforms(seeds, streams, positions)
    order = np.random.default_rng(0).permutation(len(seeds))
    assert (uniforms(seeds[order], streams[order], positions[order]) == together[order]).all()
    alone = [uniforms(seeds[i : i + 1], streams[i : i + 1], positions[i : i + 1])[0] for i in range(len(seeds))]
    assert alone == together.tolist()


def test_numbers_are_uniform_and_uncorrelated_along_every_axis():
    numbers = uniforms(*grid(4000)).reshape(len(SEEDS), 5, 4000)
    assert ((numbers >= 0) & (numbers < 1)).all()
    counts = np.histogram(numbers, bins=64, range=(0, 1))[0]
    chi_square = ((counts - numbers.size / 64) ** 2 / (numbers.size / 64)).sum()
    assert chi_square < 121  # the 0.99999 quantile for 63 degrees of freedom
    for one, other in (
        (numbers[1:], numbers[:-1]),
        (numbers[:, 1:], numbers[:, :-1]),
        (numbers[..., 1:], numbers[..., :-1]),
    ):
        correlation = np.corrcoef(one.ravel(), other.ravel())[0, 1]
        assert abs(correlation) < 5 / np.sqrt(one.size)


def test_all_53_bits_are_used():
    numbers = uniforms(*grid(50))
    mantissas = (numbers * 2**53).astype(np.uint64)
    assert (mantissas == numbers * 2**53).all()
    assert np.bitwise_or.reduce(mantissas) == 2**53 - 1
    assert np.bitwise_and.reduce(mantissas) == 0
