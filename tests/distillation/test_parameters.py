import pytest
from torch import nn

from tritflow.config import DistillationConfig, TernaryConfig
from tritflow.distillation.parameters import parameter_groups, rest_parameters
from tritflow.quantization.convert import prepare_


@pytest.fixture
def model():
    net = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(8, 8)]), "norm": nn.LayerNorm(8), "out": nn.Linear(8, 2)})
    prepare_(net, TernaryConfig(targets=("blocks.*",), column_scale=True))
    return net


def names(model, **settings):
    groups = parameter_groups(model, DistillationConfig(steps=1, **settings))
    return {g.name: set(g.parameters) for g in groups if g.parameters}


def test_what_is_trained_by_default(model):
    twin = "blocks.0"
    assert names(model) == {
        "latent weights": {f"{twin}.weight"},
        "scales": {f"{twin}.log_weight_scale"},
        "column scales": {f"{twin}.log_input_scale"},
        "biases": {f"{twin}.bias"},
    }
    assert not model["norm"].weight.requires_grad
    assert not model["out"].weight.requires_grad


def test_column_scales_can_stay_while_rows_move(model):
    found = names(model, column_learning_rate=0.0)
    assert "column scales" not in found
    assert "scales" in found
    assert not model["blocks"][0].log_input_scale.requires_grad
    assert "scales" not in names(model, train_scales=False)


def test_all_that_is_dense_can_be_trained_along(model):
    rest = {"norm.weight", "norm.bias", "out.weight", "out.bias"}
    assert names(model, rest_learning_rate=1e-4)["rest"] == rest == {n for n, _ in rest_parameters(model)}
    assert model["out"].weight.requires_grad


def test_muon_may_take_latent_weights_alone(model):
    groups = parameter_groups(model, DistillationConfig(steps=1, rest_learning_rate=1e-4))
    assert [g.name for g in groups if g.matrices] == ["latent weights"]


def test_a_model_without_twins_is_refused():
    with pytest.raises(ValueError, match="prepare_"):
        parameter_groups(nn.Linear(2, 2), DistillationConfig())
