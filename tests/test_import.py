"""`import tritflow` is lean, and diffusers learns the format whichever of the two comes first."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import tritflow

HEAVY = ("torch", "triton", "diffusers", "transformers", "accelerate", "numpy", "PIL", "typer")


# Each case in a process that has imported neither diffusers nor tritflow: forks of one that has imported the rest.
ORDERS = """
import importlib, json, os, sys, traceback
for name in ("torch._dynamo", "transformers.modeling_utils", "accelerate", "peft", "scipy.stats"):
    importlib.import_module(name)
assert not {"tritflow", "diffusers"} & set(sys.modules), "imported too early"
for case in json.loads(sys.argv[1]):
    sys.stdout.flush()
    child = os.fork()
    if not child:
        try:
            exec(case, {"__name__": "__main__"})
        except BaseException as error:
            print(repr(traceback.format_exc()))
        print("end of a case")
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


def run(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_lean() -> None:
    loaded = run(f"import sys, tritflow; print([m for m in {HEAVY} if m in sys.modules])")
    assert loaded == "[]"


EITHER = (
    "import tritflow; from diffusers import FluxTransformer2DModel",
    "from diffusers.quantizers import auto; import tritflow",
    "import diffusers, tritflow",
    "import tritflow; tritflow.TritflowConfig",
)
ALONE = "from diffusers.quantizers import auto; print('tritflow' in auto.AUTO_QUANTIZER_MAPPING)"


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    """What each case printed last."""
    cases = {imports: f"{imports}\n{LEARNED}" for imports in EITHER} | {ALONE: ALONE}
    parts = run(ORDERS, json.dumps(list(cases.values()))).split("end of a case")[:-1]
    return {name: part.strip().splitlines()[-1] for name, part in zip(cases, parts, strict=True)}


LEARNED = """
import inspect, sys
from diffusers.quantizers import auto
assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["tritflow"] is tritflow.TritflowConfig
assert "tritflow" in auto.AUTO_QUANTIZER_MAPPING
assert "class DiffusersAutoQuantizer" in inspect.getsource(auto)  # the module got its own loader back
assert type(auto.__spec__.loader).__module__.startswith(("importlib", "_frozen_importlib"))
print("torch.cuda started:", sys.modules["torch"].cuda.is_initialized())
"""


@pytest.mark.parametrize("imports", EITHER)
def test_diffusers_learns_the_format_in_either_order(imports: str, said: dict[str, str]) -> None:
    assert said[imports] == "torch.cuda started: False"


def test_diffusers_alone_is_left_as_it_was(said: dict[str, str]) -> None:
    assert said[ALONE] == "False"


def test_version_is_that_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert tritflow.__version__ == project["version"]


def test_every_public_name_exists() -> None:
    for name in tritflow.__all__:
        assert getattr(tritflow, name) is not None
        assert name in dir(tritflow)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'optimise'"):
        _ = tritflow.optimise


def test_the_stub_names_what_loads_lazily() -> None:
    stub = Path(tritflow.__file__).with_suffix(".pyi").read_text()
    typed = {line.rpartition(" as ")[2] for line in stub.splitlines() if " as " in line}
    assert typed | {"__version__"} == {*tritflow.__all__, "assets"}
