from __future__ import annotations

import pytest

from tritflow.calibration.prompts import PromptsError
from tritflow.evaluation.api import get_task
from tritflow.pipelines.scene_prompts import held_out_prompts, scene_prompts


def test_a_number_names_that_many_captions_and_other_names_are_left_alone() -> None:
    found = scene_prompts("scenes:3")
    assert found is not None
    assert len(found.texts) == 3
    assert scene_prompts("prompts.txt") is None


@pytest.mark.parametrize("name", ["scenes:", "scenes:x", "scenes:0", "scenes:99999999"])
def test_a_wrong_number_of_captions_is_said(name: str) -> None:
    with pytest.raises(PromptsError, match="scenes:N"):
        scene_prompts(name)


def test_held_out_prompts_are_the_suites() -> None:
    found = held_out_prompts("held-out:2")
    assert found is not None
    assert sorted(found.texts) == sorted(r.text for r in get_task("scenes").prompts(per_tag=2))
    assert held_out_prompts("prompts.txt") is None
    assert held_out_prompts("scenes:3") is None
    for name in ("held-out:", "held-out:x", "held-out:0"):
        with pytest.raises(PromptsError, match="held-out:N"):
            held_out_prompts(name)
