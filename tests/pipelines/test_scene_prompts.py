from __future__ import annotations

import pytest

from tritflow.calibration.prompts import PromptsError
from tritflow.pipelines.scene_prompts import scene_prompts


def test_a_number_names_that_many_captions_and_other_names_are_left_alone() -> None:
    found = scene_prompts("scenes:3")
    assert found is not None
    assert len(found.texts) == 3
    assert scene_prompts("prompts.txt") is None


@pytest.mark.parametrize("name", ["scenes:", "scenes:x", "scenes:0", "scenes:99999999"])
def test_a_wrong_number_of_captions_is_said(name: str) -> None:
    with pytest.raises(PromptsError, match="scenes:N"):
        scene_prompts(name)
