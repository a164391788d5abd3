"""The table a persistent product follows: every K step of every tile exactly once, evenly dealt."""

from collections import Counter

import pytest

from tritflow.kernels.hopper.schedule import COUNTER, FIRST_SLOT, PARTS, ROW, SLOT, STEP, STEPS, TOKEN, make_schedule

SHAPES = [(4608, 9216, 3072), (4608, 3072, 12288), (512, 3072, 12288), (512, 3072, 3072), (77, 264, 144), (1, 8, 16)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [(128, 256), (128, 128), (64, 256)])
@pytest.mark.parametrize("blocks", [1, 7, 132])
def test_every_step_of_every_tile_once(shape, block, blocks):
    m, n, k = shape
    block_m, block_n = block
    schedule = make_schedule(m, n, k, block_m=block_m, block_n=block_n, blocks=blocks, tail="cut")
    seen = Counter(
        (unit[TOKEN], unit[ROW], step)
        for unit in schedule.units
        for step in range(unit[STEP], unit[STEP] + unit[STEPS])
    )
    assert set(seen.values()) == {1}
    assert len(seen) == -(-m // block_m) * -(-n // block_n) * -(-k // 128)
    assert schedule.grid <= blocks
    assert schedule.starts[-1] == len(schedule.units)


@pytest.mark.parametrize("shape", SHAPES)
def test_cut_tiles_have_their_own_slots_and_counters(shape):
    m, n, k = shape
    schedule = make_schedule(m, n, k, block_m=128, block_n=256, blocks=132, tail="cut")
    cut = [unit for unit in schedule.units if unit[PARTS] > 1]
    assert sorted(unit[SLOT] for unit in cut) == list(range(schedule.slots))
    tiles: dict[int, list[tuple[int, ...]]] = {}
    for unit in cut:
        tiles.setdefault(unit[COUNTER], []).append(unit)
    assert sorted(tiles) == list(range(schedule.counters))
    for units in tiles.values():
        assert {(u[TOKEN], u[ROW], u[PARTS], u[FIRST_SLOT]) for u in units} == {
            (units[0][TOKEN], units[0][ROW], len(units), units[0][FIRST_SLOT])
        }
        # Parts are summed in the order of their slots, which is the order of K.
        in_order = sorted(units, key=lambda u: u[SLOT])
        assert [u[SLOT] for u in in_order] == list(range(units[0][FIRST_SLOT], units[0][FIRST_SLOT] + len(units)))
        assert [u[STEP] for u in in_order] == sorted(u[STEP] for u in units)


@pytest.mark.parametrize(
    ("shape", "share"), [((4608, 3072, 12288), 0.97), ((4608, 12288, 3072), 0.98), ((512, 3072, 12288), 0.95)]
)
def test_cutting_evens_out_the_last_wave(shape, share):
    m, n, k = shape
    size = {"block_m": 128, "block_n": 256, "blocks": 132}
    cut, plain = make_schedule(m, n, k, **size, tail="cut"), make_schedule(m, n, k, **size)
    ideal = (m // 128) * (n // 256) * (k // 128) / 132
    assert ideal / cut.critical_steps() > share > ideal / plain.critical_steps()


@pytest.mark.parametrize("shape", SHAPES)
def test_halves_cover_every_row_once(shape):
    m, n, k = shape
    schedule = make_schedule(m, n, k, block_m=128, block_n=256, blocks=132, tail="halve")
    rows: Counter[tuple[int, int]] = Counter()
    for unit in schedule.units:
        assert (unit[STEP], unit[STEPS]) == (0, -(-k // 128))
        for block in range(2 if unit[PARTS] else 1):
            if unit[ROW] + 128 * block < n:
                rows[unit[TOKEN], unit[ROW] + 128 * block] += 1
    assert set(rows.values()) == {1}
    assert len(rows) == -(-m // 128) * -(-n // 128)
    assert schedule.halves == any(unit[PARTS] == 0 for unit in schedule.units)


def test_halves_fill_the_last_wave_where_they_fit():
    size = {"block_m": 128, "block_n": 256, "blocks": 132}
    whole, halves = (make_schedule(4608, 3072, 12288, **size, tail=tail) for tail in ("whole", "halve"))
    assert whole.critical_steps() == 4 * 96
    assert 3.5 * 96 <= halves.critical_steps() < 3.6 * 96
    # 108 tiles of a wave of 132 are more than halves could spread: nothing is gained, nothing is halved.
    assert not make_schedule(4608, 9216, 3072, **size, tail="halve").halves


def test_bands_share_what_a_wave_reads():
    schedule = make_schedule(4608, 9216, 3072, block_m=128, block_n=256, blocks=132, group=8)
    first_wave = [schedule.units[start] for start in schedule.starts[:-1]]
    assert len({unit[TOKEN] for unit in first_wave}) == 8
    assert len({unit[ROW] for unit in first_wave}) == 17


def test_a_schedule_needs_positive_sizes():
    with pytest.raises(ValueError, match="positive sizes"):
        make_schedule(0, 128, 128, block_m=128, block_n=256, blocks=132)
