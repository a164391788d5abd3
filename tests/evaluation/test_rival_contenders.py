import pytest

from tritflow.evaluation.api import EvaluationError
from tritflow.evaluation.contenders import contender
from tritflow.pipelines.quantize import quantize
from tritflow.pipelines.rivals import RivalError
from tritflow.testing import tiny_flux_folder


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return tiny_flux_folder(tmp_path_factory.mktemp("wide") / "flux", hidden=256, heads=4)


def test_a_rival_draws_from_the_same_noise_and_says_its_bits(wide):
    teacher = contender(str(wide), device="cpu")
    rival = contender(str(wide), device="cpu", rival="q4_k-simulated")
    assert rival.model.hash != teacher.model.hash
    assert rival.model.name == "flux-q4_k-simulated"
    assert rival.settings.extra["rival"] == "q4_k-simulated"
    assert teacher.facts is None
    assert rival.facts is not None
    facts = rival.facts()
    assert facts["bits_per_weight"] == 4.5
    assert facts["simulated"] is True
    prompts, seeds = ["a red cube"], [3]
    one, other = (who.load()(prompts, seeds)[0] for who in (teacher, rival))
    assert one.size == other.size
    assert one.tobytes() != other.tobytes()


def test_what_cannot_be_is_refused_before_anything_is_drawn(wide, tmp_path):
    with pytest.raises(RivalError, match="did you mean 'hqq-2'"):
        contender(str(wide), device="cpu", rival="hqq2")
    with pytest.raises(RivalError, match="torchao"):
        contender(str(wide), device="cpu", rival="torchao-int4")
    quantize(wide, tmp_path / "ternary", "fast", device="cpu")
    with pytest.raises(EvaluationError, match="ternary already"):
        contender(str(tmp_path / "ternary"), device="cpu", rival="q4_k-simulated")
