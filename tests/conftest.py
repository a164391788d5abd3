"""Fixtures shared by all rooms: a tiny random FLUX pipeline folder, written once a session."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import hypothesis
import pytest
import torch

# The machine is shared: a slow example is no failure.
hypothesis.settings.register_profile("tritflow", deadline=None)
hypothesis.settings.load_profile("tritflow")

# Side by side with other workers, threads that wait for each other take most of the time: 39 s for what takes 6.
ALONE = "PYTEST_XDIST_WORKER" not in os.environ
torch.set_num_threads(min(2 if ALONE else 1, torch.get_num_threads()))
if not ALONE:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock FluxPipeline folder with random weights. Shared: tests must not write into it."""
    from tritflow.testing import tiny_flux_folder

    return tiny_flux_folder(tmp_path_factory.mktemp("tiny") / "flux")
