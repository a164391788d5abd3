import pytest
import torch
from safetensors.torch import save_file

from tritflow.formats.safetensors_file import SafetensorsFile
from tritflow.formats.staging import Staging, staging


def _source(data, sizes):
    place = 0

    def read(view):
        nonlocal place
        sizes.append(len(view))
        view[:] = data[place : place + len(view)]
        place += len(view)

    return read


@pytest.mark.parametrize("count", [1, 63, 64, 65, 200, 256])
def test_bytes_arrive_in_order_and_in_parts(count):
    data = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))
    out, sizes = torch.zeros(count, dtype=torch.uint8), []
    Staging(torch.device("cpu"), size=64).fill(out, _source(data.numpy().tobytes(), sizes))
    assert torch.equal(out, data)
    assert sizes == [64] * (count // 64) + ([count % 64] if count % 64 else [])


def test_a_failed_read_leaves_the_buffers_usable():
    def fails(view):
        raise OSError("gone")

    stage = Staging(torch.device("cpu"), size=8)
    out = torch.zeros(4, dtype=torch.uint8)
    with pytest.raises(OSError, match="gone"):
        stage.fill(out, fails)
    stage.fill(out, _source(b"\1\2\3\4", []))
    assert out.tolist() == [1, 2, 3, 4]


def test_a_device_has_one():
    assert staging(torch.device("cpu")) is staging(torch.device("cpu"))


def test_other_devices_are_read_by_way_of_memory(tmp_path):
    save_file({"a": torch.arange(6.0).view(2, 3)}, tmp_path / "file.safetensors")
    file = SafetensorsFile(tmp_path / "file.safetensors")
    found = file.tensor("a", device="meta")
    assert (found.device.type, found.shape, found.dtype) == ("meta", (2, 3), torch.float32)
    assert torch.equal(file.tensor("a", device="cpu"), torch.arange(6.0).view(2, 3))
