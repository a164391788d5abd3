"""Which licence a ternary model is under: its base model's, which travels with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritflow.formats.architecture import FLUX1_DEV
from tritflow.formats.integrity import architecture

FILES = ("LICENSE.md", "LICENSE", "LICENSE.txt")


class PushError(ValueError):
    """A folder that is not fit to be published, or a hub that will not take it. Says what to do."""


@dataclass(frozen=True)
class Licence:
    """As the hub's model cards name it.

    Attributes:
        id: `apache-2.0`, ... or `other`.
        name: of an `other` one.
        link: where its text is.
        found: how it is known, in words.
        strict: whether it must travel along, so that no other may be named and its text has to be in the folder.
    """

    id: str
    name: str = ""
    link: str = ""
    found: str = ""
    strict: bool = False

    def __str__(self) -> str:
        return self.name or self.id


FLUX1_DEV_LICENCE = Licence(
    "other",
    "flux-1-dev-non-commercial-license",
    "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
    "the transformer has FLUX.1-dev's architecture",
    strict=True,
)


def licence_of(config: dict[str, Any], cards: list[Path], own_model: bool, given: str | None) -> Licence:
    """The licence of the model that a ternary one was made from.

    Args:
        config: of the transformer.
        cards: README.md files of the base model, or of this folder's earlier card.
        own_model: whether the base is the built-in small FLUX.
        given: what the user says it is (an id of the hub, such as `apache-2.0`).

    Raises `PushError` when nothing tells, or when `given` contradicts what does.
    """
    known = _known(config, cards, own_model)
    if known is None:
        if given is None:
            raise PushError("the base model's licence is not known; name it: --license ID (such as apache-2.0)")
        return Licence(given, found="as given")
    if given in (None, known.id, known.name):
        return known
    if known.strict:
        raise PushError(
            f"--license {given}: the base model is under {known} ({known.found}), and so is whatever is made from it; "
            "leave --license out"
        )
    return Licence(str(given), found="as given")


def licence_file(places: list[Path]) -> Path | None:
    """The text of the licence in one of these folders."""
    return next((place / name for place in places for name in FILES if (place / name).is_file()), None)


def card_data(path: Path) -> dict[str, Any]:
    """The YAML head of a model card; empty when there is none. Raises `PushError` for a broken one."""
    from huggingface_hub.repocard import metadata_load

    try:
        return metadata_load(path) or {}
    except Exception as error:  # PyYAML's own, ValueError, UnicodeDecodeError: whatever a foreign file brings about
        raise PushError(f"{path}: its YAML head cannot be read ({type(error).__name__}); mend or delete it") from None


def _known(config: dict[str, Any], cards: list[Path], own_model: bool) -> Licence | None:
    if own_model:
        return Licence("apache-2.0", found="the built-in small FLUX's")
    for path in cards:
        data = card_data(path) if path.is_file() else {}
        if data.get("license"):
            named = str(data["license"])
            text = {key: str(data.get(f"license_{key}") or "") for key in ("name", "link")}
            return Licence(
                named, text["name"], text["link"], f"as {path.parent.name}/{path.name} says", named == "other"
            )
    plain, dev = architecture(config), architecture(FLUX1_DEV)
    if plain == dev:
        return FLUX1_DEV_LICENCE
    if plain == {**dev, "guidance_embeds": False}:
        return Licence("apache-2.0", found="the transformer has FLUX.1-schnell's architecture")
    return None
