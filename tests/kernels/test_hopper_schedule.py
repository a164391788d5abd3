"""The table a persistent product follows: every K step of every tile exactly once, evenly dealt."""

from collections import Counter
from itertools import pairwise

import pytest

from tritflow.kernels.hopper import why_not_compile
from tritflow.kernels.hopper.schedule import ROW, STEP, STEPS, TOKEN, make_schedule

SHAPES = [(4608, 9216, 3072), (4608, 3072, 12288), (512, 3072, 12288), (512, 3072, 3072), (77, 264, 144), (1, 8, 16)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [(128, 256), (128, 128), (64, 256)])
@pytest.mark.parametrize("blocks", [1, 7, 132])
def test_every_step_of_every_tile_once(shape, block, blocks):
    m, n, k = shape
    block_m, block_n = block
    schedule = make_schedule(m, n, k, block_m=block_m, block_n=block_n, blocks=blocks)
    seen = Counter(
        (unit[TOKEN], unit[ROW], step)
        for unit in schedule.units
        for step in range(unit[STEP], unit[STEP] + unit[STEPS])
    )
    assert set(seen.values()) == {1}
    assert len(seen) == -(-m // block_m) * -(-n // block_n) * -(-k // 128)
    assert schedule.grid <= blocks
    assert schedule.starts[-1] == len(schedule.units)


def test_work_is_dealt_evenly():
    schedule = make_schedule(4608, 3072, 12288, block_m=128, block_n=256, blocks=132)
    sizes = {end - start for start, end in pairwise(schedule.starts)}
    assert sizes == {3, 4}  # 432 tiles
    assert schedule.critical_steps() == 4 * 96


def test_narrow_tiles_are_chosen_where_they_fill_the_last_wave():
    if reason := why_not_compile():
        pytest.skip(reason)
    from tritflow.kernels.hopper.launch import shortest

    rows = {shape: shortest(*shape, 8, 132).block_n for shape in [*SHAPES, (4608, 12288, 3072), (512, 12288, 3072)]}
    assert rows[4608, 9216, 3072] == rows[4608, 12288, 3072] == 256  # 9.8 and 13.1 waves of wide tiles
    assert rows[4608, 3072, 12288] == rows[512, 3072, 3072] == rows[512, 12288, 3072] == 128  # 3.3, .4 and 1.5


def test_bands_share_what_a_wave_reads():
    schedule = make_schedule(4608, 9216, 3072, block_m=128, block_n=256, blocks=132, group=8)
    first_wave = [schedule.units[start] for start in schedule.starts[:-1]]
    assert len({unit[TOKEN] for unit in first_wave}) == 8
    assert len({unit[ROW] for unit in first_wave}) == 17


def test_a_schedule_needs_positive_sizes():
    with pytest.raises(ValueError, match="positive sizes"):
        make_schedule(0, 128, 128, block_m=128, block_n=256, blocks=132)
