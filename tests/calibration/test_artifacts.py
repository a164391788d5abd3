import json

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tritflow.calibration.artifacts import file_sha256, write_tensors


def test_tensors_are_written_one_by_one_and_read_by_the_library(tmp_path):
    tensors = {
        "flags": torch.tensor([True, False]),
        "latent": torch.randn(3, 5).bfloat16(),
        "turned": torch.randn(4, 6).T,
        "none": torch.empty(0, 7),
        "step": torch.tensor(3),
        "wide": torch.randn(2, 2, dtype=torch.float64),
    }
    path = tmp_path / "new" / "x.safetensors"
    digest = write_tensors(path, tensors, {"b": 1, "a": [2]})
    assert digest == file_sha256(path)
    found = load_file(path)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    with safe_open(path, framework="pt") as stream:
        assert json.loads(stream.metadata()["tritflow"]) == {"a": [2], "b": 1}
    assert write_tensors(tmp_path / "y.safetensors", tensors, {"a": [2], "b": 1}) == digest
    write_tensors(path, {"only": torch.ones(2)})
    assert load_file(path)["only"].tolist() == [1, 1]
    assert [p.name for p in path.parent.iterdir()] == ["x.safetensors"]
