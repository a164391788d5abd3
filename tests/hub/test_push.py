"""`tritflow push`: what is refused, what the card says, what goes up; the hub is a fake, nothing leaves the machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.repocard import metadata_load
from typer.testing import CliRunner

import tritflow
from tritflow.cli.main import app
from tritflow.formats.architecture import FLUX1_DEV
from tritflow.formats.errors import CheckpointError
from tritflow.hub.licences import FLUX1_DEV_LICENCE, licence_of
from tritflow.hub.push import Package, PushError, prepare, push

NOT_DEV = {**FLUX1_DEV, "num_layers": 3}
CARD_OF_DEV = """---
license: other
license_name: flux-1-dev-non-commercial-license
license_link: LICENSE.md
---
# FLUX.1-dev
"""


class FakeHub:
    """Remembers what it was asked for; raises `error` where told."""

    def __init__(self, error: Exception | None = None, at: str = "whoami") -> None:
        self.error, self.at = error, at
        self.calls: list[str] = []
        self.files: dict[str, bytes] = {}
        self.private = False

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if self.error is not None and name == self.at:
            raise self.error

    def whoami(self) -> dict[str, str]:
        self._called("whoami")
        return {"name": "me"}

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        self._called("create_repo")
        assert exist_ok
        self.private = private

    def create_commit(self, repo_id: str, operations: list[Any], *, commit_message: str) -> Any:
        self._called("create_commit")
        for operation in operations:
            with operation.as_file() as file:
                self.files[operation.path_in_repo] = file.read()
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/abc")


@pytest.fixture(scope="module")
def quantized(tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("base") / "flux"
    shutil.copytree(tiny_flux, source)
    (source / "README.md").write_text(CARD_OF_DEV)
    (source / "LICENSE.md").write_text("the licence's text\n")
    out = tmp_path_factory.mktemp("push") / "ternary"
    tritflow.quantize(source, out, "fast", device="cpu")
    return out


@pytest.fixture
def folder(quantized: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(quantized, tmp_path / "ternary"))


def ready(folder: Path, **changes: Any) -> Package:
    return prepare(folder, "me/tiny", **{"base_model": "black-forest-labs/FLUX.1-dev", **changes})


def test_the_licence_of_the_base_is_carried_over(folder: Path) -> None:
    package = ready(folder)
    card = (folder / "README.md").read_text()
    head = metadata_load(folder / "README.md")
    assert head is not None
    assert head["license"] == "other"
    assert head["license_name"] == "flux-1-dev-non-commercial-license"
    assert head["license_link"] == "LICENSE.md"
    assert head["base_model"] == "black-forest-labs/FLUX.1-dev"
    assert head["base_model_relation"] == "quantized"
    assert "for non-commercial use" in card
    assert "LICENSE.md" in {f.path for f in package.files}
    # A second time the first card tells base and licence.
    again = prepare(folder, "me/tiny")
    assert again.licence.name == package.licence.name
    assert (folder / "README.md").read_text() == card


def test_the_card_tells_sizes_recipe_and_how_to_load(folder: Path) -> None:
    ready(folder)
    card = (folder / "README.md").read_text()
    bits = json.loads(CliRunner().invoke(app, ["inspect", str(folder), "--json"]).stdout)[0]
    assert f"| bits a parameter, all of the transformer | {bits['bits_per_parameter']:.3f} |" in card
    assert f"{bits['ternary_layers']} linear layers" in card
    assert "- recipe `fast`: exact MSE-optimal rounding" in card
    assert json.loads((folder / "meta.json").read_text())["digest"] in card
    code = card.split("```python\n")[1].split("```")[0].replace('.to("cuda")', "").replace("me/tiny", str(folder))
    code = code.replace("bfloat16", "float32")
    scope: dict[str, Any] = {}
    exec(code, scope)  # the card's own lines, on this folder
    assert scope["image"].size == (32, 32)


def test_a_bare_transformer_is_loaded_with_its_base(folder: Path) -> None:
    for path in list(folder.iterdir()):
        if path.name not in ("transformer", "meta.json", "LICENSE.md"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    meta = json.loads((folder / "meta.json").read_text())
    secret = "/home/somebody/hub/models--black-forest-labs--FLUX.1-dev/snapshots/abc"
    (folder / "meta.json").write_text(json.dumps({**meta, "base": secret}))
    config = json.loads((folder / "transformer" / "config.json").read_text())
    (folder / "transformer" / "config.json").write_text(json.dumps({**config, "_name_or_path": "/home/somebody/x"}))
    package = prepare(folder, "me/tiny", license="apache-2.0")
    card = (folder / "README.md").read_text()
    assert 'FluxTransformer2DModel.from_pretrained(\n    "me/tiny", subfolder="transformer"' in card
    assert 'FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", transformer=transformer' in card
    hub = FakeHub()
    push(package, api=hub)
    assert json.loads(hub.files["meta.json"])["base"] == "black-forest-labs/FLUX.1-dev"
    assert not any(b"somebody" in data for data in hub.files.values())


def test_everything_goes_up_in_one_commit(folder: Path) -> None:
    (folder / "notes.docx").write_text("no part of a model")
    (folder / ".work").mkdir()
    (folder / ".work" / "secret.json").write_text("{}")
    package = ready(folder)
    assert package.left_out == ("notes.docx",)
    hub = FakeHub()
    assert push(package, private=True, api=hub) == "https://huggingface.co/me/tiny/commit/abc"
    assert hub.calls == ["whoami", "create_repo", "create_commit"]
    assert hub.private
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert hub.files[weights] == (folder / weights).read_bytes()
    assert hub.files["README.md"] == (folder / "README.md").read_bytes()
    assert {"model_index.json", "meta.json", "generation.json"} <= hub.files.keys()
    assert not any("secret" in name or "docx" in name for name in hub.files)


def test_the_built_in_model_needs_no_words(tmp_path: Path) -> None:
    tritflow.quantize("small", tmp_path / "out", "absmean", device="cpu")
    package = prepare(tmp_path / "out", "me/small")
    assert str(package.licence) == "apache-2.0"
    head = metadata_load(tmp_path / "out" / "README.md")
    assert head is not None
    assert "base_model" not in head
    assert "height=128, width=128" in (tmp_path / "out" / "README.md").read_text()


def test_scores_of_this_very_model(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "eval"
    asked = ["evaluate", "scenes", "--per-tag", "1", "--seeds-per-prompt", "1", "--steps", "1", "--device", "cpu"]
    done = CliRunner().invoke(app, [*asked, "--model", str(folder), "--out", str(out)])
    assert done.exit_code == 0, done.output
    results = out / "results.json"
    ready(folder, results=[results])
    assert "| scenes | w2a16 |" in (folder / "README.md").read_text()
    other = json.loads(results.read_text())
    from tritflow.results import append

    run = other["runs"][0]
    run["model"]["hash"] = "0" * 16
    append(tmp_path / "other.json", "scenes", run)
    with pytest.raises(PushError, match="hold no evaluation of this very model"):
        ready(folder, results=[tmp_path / "other.json"])


def test_scores_of_the_shipped_student_which_is_a_transformer_alone(tmp_path: Path) -> None:
    from tritflow.evaluation.contenders import contender
    from tritflow.results import append

    shutil.copytree(tritflow.assets.student_path(), tmp_path / "student")
    drew = contender("small-student", device="cpu").model
    score = {"value": 0.5, "low": 0.4, "high": 0.6}
    run = {
        "label": "best", "device": "cpu", "model": {"name": drew.name, "hash": drew.hash},
        "task": {"name": "scenes", "scored_by": "tritflow"}, "settings": {"extra": {"mode": "w2a16"}},
        "scores": {"overall": score}, "prompts": {"count": 8, "samples": 1},
    }  # fmt: skip
    append(tmp_path / "results.json", "scenes", run)
    prepare(tmp_path / "student", "me/small", results=[tmp_path / "results.json"])
    assert "| scenes | w2a16 |" in (tmp_path / "student" / "README.md").read_text()
    meta = json.loads((tmp_path / "student" / "meta.json").read_text())
    meta["parents"]["source"] = "0" * 16  # of another model, which is not here
    (tmp_path / "student" / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(PushError, match="leave out --results"):
        prepare(tmp_path / "student", "me/x", base_model="a/b", license="mit", results=[tmp_path / "results.json"])


def damage_bit(folder: Path) -> None:
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-50] ^= 1
    path.write_bytes(data)


def unfinished(folder: Path) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "complete": False}))


def half_encoder(folder: Path) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (unfinished, "is unfinished; run the `tritflow quantize`"),
        (damage_bit, "does not match its checksum"),
        (half_encoder, "text_encoder/model.safetensors"),
        (lambda f: (f / "vae" / "old.bin").write_bytes(b"x"), "old.bin: is a pickle"),
        (lambda f: (f / "transformer" / "a.pt").write_bytes(b"x"), "a.pt: is a pickle"),
        (lambda f: (f / "meta.json").unlink(), "not a folder that `tritflow quantize` wrote"),
        (lambda f: (f / "LICENSE.md").unlink(), "must go along with the model; put its text into"),
        (lambda f: (f / "README.md").write_text("---\nlicense: [\n---\n"), "YAML head cannot be read"),
    ],
)
def test_folders_that_are_not_fit(change: Any, words: str, folder: Path) -> None:
    before = (folder / "README.md").read_text()
    change(folder)
    with pytest.raises((PushError, CheckpointError)) as caught:
        ready(folder)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (folder / "README.md").read_text() == before or "YAML" in words


def test_wrong_names_and_licences(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PushError, match="write owner/name"):
        prepare(folder, "tiny")
    with pytest.raises(PushError, match="there is no such folder"):
        ready(tmp_path / "nothing")
    with pytest.raises(PushError, match="name it: --base-model OWNER/NAME"):
        prepare(folder, "me/tiny")
    with pytest.raises(PushError, match="is under flux-1-dev-non-commercial-license"):
        ready(folder, license="apache-2.0")


def test_what_tells_the_licence() -> None:
    assert licence_of(dict(FLUX1_DEV), [], False, None) == FLUX1_DEV_LICENCE
    with pytest.raises(PushError, match="leave --license out"):
        licence_of(dict(FLUX1_DEV), [], False, "mit")
    schnell = licence_of({**FLUX1_DEV, "guidance_embeds": False}, [], False, None)
    assert schnell.id == "apache-2.0"
    assert licence_of(NOT_DEV, [], True, None).id == "apache-2.0"
    assert licence_of(NOT_DEV, [], False, "mit").id == "mit"
    with pytest.raises(PushError, match="is not known; name it: --license"):
        licence_of(NOT_DEV, [], False, None)


class Unauthorized(Exception):
    def __init__(self, status: int) -> None:
        super().__init__("a page of HTML\nand more of it")
        self.response = SimpleNamespace(status_code=status)


class LocalTokenNotFoundError(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "at", "words"),
    [
        (LocalTokenNotFoundError("Token is required"), "whoami", "run `hf auth login`, or set HF_TOKEN"),
        (Unauthorized(401), "whoami", "not logged in to the hub"),
        (Unauthorized(403), "create_repo", "this token may not write to me/tiny"),
        (ConnectionError("no route"), "create_commit", "the hub cannot be reached"),
        (Unauthorized(500), "create_commit", "the hub refused me/tiny (Unauthorized): a page of HTML"),
    ],
)
def test_a_hub_that_will_not(error: Exception, at: str, words: str, folder: Path) -> None:
    with pytest.raises(PushError) as caught:
        push(ready(folder), api=FakeHub(error, at))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["push", str(folder), "me/tiny", "--base-model", "black-forest-labs/FLUX.1-dev"]
    dry = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert dry.stdout.strip().endswith("README.md")
    assert "transformer/diffusion_pytorch_model.safetensors" in dry.stderr
    assert "licence flux-1-dev-non-commercial-license" in dry.stderr
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: FakeHub(LocalTokenNotFoundError("Token is required")))
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 2
    assert refused.stderr.splitlines()[-1].startswith("error: not logged in to the hub")
    hub = FakeHub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["address"].endswith("/commit/abc")
    assert told["files"].keys() == hub.files.keys()
