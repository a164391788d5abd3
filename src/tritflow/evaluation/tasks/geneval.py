"""GenEval: 553 prompts in six tags, judged by what a detector and a colour classifier find.

Pictures lie as the project's own scorer reads them: `00012/metadata.jsonl`, `00012/samples/0003.png`. The scorers
here are current transformers models, which are not the suite's own: their scores are named as substitutes'. The
official scorer can be run on the same folder and its `results.jsonl` read back (`read_official`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tritflow.calibration.prompt_sources import FILES, prompts_folder
from tritflow.evaluation import official
from tritflow.evaluation.api import NO_OPTIONS, EvaluationError, Judgement, Progress, PromptRecord, Task, TaskOptions
from tritflow.evaluation.images import ImageSet, ImageSetError
from tritflow.evaluation.ledger import Ledger
from tritflow.evaluation.scorers import clip_colors, mask2former
from tritflow.evaluation.scorers.detection import Detection, Detector
from tritflow.evaluation.scorers.loading import Pixels, batches
from tritflow.evaluation.tasks import geneval_rules as rules

OFFICIAL_RESULTS = "results.jsonl"
"""What the suite's scorer is told to write into the picture folder (its `--outfile`)."""

_PROMPTS = next(f for f in FILES if f.name == "evaluation_metadata.jsonl")


class GenEvalTask(Task):
    """The suite of Ghosh, Hajishirzi and Schmidt 2023 (arXiv 2310.11513)."""

    name = "geneval"
    version = 1
    tags = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
    overall_tags = tags
    roles = ("detector", "colors")
    substitutes = {  # noqa: RUF012
        "detector": mask2former.STANDS_FOR,
        "colors": clip_colors.STANDS_FOR,
    }
    default_samples = 4

    def __init__(self, options: TaskOptions = NO_OPTIONS) -> None:
        super().__init__(options)
        self._detector: Detector | None = None
        self._colors: clip_colors.ClipColors | None = None
        self._given: dict[str, str] = {}

    def prompts(
        self, split: str = "test", per_tag: int | None = None, seed: int = 0, tags: Sequence[str] | None = None
    ) -> list[PromptRecord]:
        """The suite's prompts in its own order; with `per_tag` the first ones of each tag.

        An id is the prompt's place in the suite, which names its folder and decides its seeds.
        Raises `PromptsError` when the suite's file is not there or not the pinned one.
        """
        if split != "test":
            raise EvaluationError(f"geneval has no split '{split}'; its prompts are 'test'")
        wanted = self.check_tags(tags)
        text = _PROMPTS.read(self.options.prompts or prompts_folder())
        taken: dict[str, int] = {}
        records = []
        for i, line in enumerate(line for line in text.splitlines() if line.strip()):
            row = json.loads(line)
            tag = row["tag"]
            if tag in wanted and (per_tag is None or taken.get(tag, 0) < per_tag):
                taken[tag] = taken.get(tag, 0) + 1
                records.append(PromptRecord(f"{i:05d}", tag, row["prompt"], row))
        return records

    def sources(self, split: str) -> dict[str, str]:
        return {_PROMPTS.origin: _PROMPTS.sha256}

    def picture_path(self, record: PromptRecord, index: int, sample: int) -> str:
        return f"{record.id}/samples/{sample:04d}.png"

    def sidecars(self, records: Sequence[PromptRecord]) -> dict[str, bytes]:
        return {f"{r.id}/metadata.jsonl": (json.dumps(r.metadata) + "\n").encode() for r in records}

    def load(self, detector: Detector | None = None, colors: Any = None) -> None:
        """Make the scorers ready: those given, or the models that the options name."""
        chosen, device = self.options.scorers, self.options.device
        self._given = {r: s.name for r, s in (("detector", detector), ("colors", colors)) if s is not None}
        self._detector = detector or mask2former.Mask2FormerDetector(
            chosen.get("detector", mask2former.DEFAULT), device
        )
        self._colors = colors or clip_colors.ClipColors(chosen.get("colors", clip_colors.DEFAULT), device)
        self.scorers = {
            "detector": self._detector.name,
            "colors": self._colors.name,
            "rules": "tritflow.evaluation.tasks.geneval_rules",
        }

    def chosen_scorers(self) -> dict[str, str]:
        return {**super().chosen_scorers(), **self._given}

    def score(
        self, images: ImageSet, progress: Progress | None = None, ledger: Ledger | None = None
    ) -> list[Judgement]:
        """Detect, classify the colours that are asked for, decide.

        Raises `EvaluationError` for a prompt whose classes the detector does not know.
        """
        kept = Ledger() if ledger is None else ledger
        if kept.knows(images.entries):
            kept.tell(self)
            return kept.judgements(images.entries)
        if self._detector is None:
            self.load()
        assert self._detector is not None
        metadata = {r.id: r.metadata for r in images.records}
        self._check_classes(metadata)
        for entries, pictures in batches(images, images.entries, self.options.batch_size, kept.knows):
            asked = [metadata[e["prompt_id"]] for e in entries]
            # The lower threshold: the rules apply the counting one themselves.
            found = self._detector.detect(pictures, [_classes(m) for m in asked], rules.THRESHOLD)
            objects = [rules.keep(f, rules.threshold_for(m)) for f, m in zip(found, asked, strict=True)]
            colors = self._colors_of(pictures, asked, objects)
            judgements = []
            for e, m, seen in zip(entries, asked, objects, strict=True):
                passed, reason = rules.judge(m, seen, colors.__getitem__)
                judgements.append(Judgement(e["prompt_id"], e["tag"], e["sample"], e["seed"], float(passed), reason))
            kept.add(self, entries, judgements)
            if progress is not None:
                progress(len(kept), len(images.entries))
        return kept.judgements(images.entries)

    def _colors_of(
        self, pictures: Sequence[Pixels], asked: Sequence[dict[str, Any]], objects: Sequence[rules.Objects]
    ) -> _ColorTable:
        """The colour of every detection that the rules will ask about, classified in one go."""
        assert self._colors is not None
        wanted: list[tuple[Pixels, Detection]] = [
            (picture, d)
            for picture, m, seen in zip(pictures, asked, objects, strict=True)
            for d in rules.asked_for_color(m, seen)
        ]
        return _ColorTable([d for _, d in wanted], self._colors.classify(wanted))

    def _check_classes(self, metadata: dict[str, dict[str, Any]]) -> None:
        assert self._detector is not None
        known = self._detector.classes
        for name, m in metadata.items():
            for unknown in [c for c in _classes(m) if known is not None and c not in known]:
                raise EvaluationError(
                    f"prompt '{name}' asks for '{unknown}', which {self._detector.name} does not know"
                )

    def read_official(self, images: ImageSet) -> list[Judgement]:
        """Verdicts of the suite's own scorer from `results.jsonl` in the picture folder.

        Raises `EvaluationError` when it is not there or no such output, and `ImageSetError`, naming a picture, when it
        is of another folder's pictures, of other prompts, or does not have exactly one verdict on each picture.
        """
        path = images.folder / OFFICIAL_RESULTS
        try:
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
            names = [str(r["filename"]) for r in rows]
        except FileNotFoundError:
            raise EvaluationError(
                f"{path}: the official scorer's output is not there; run it on {images.folder} with "
                f"--outfile {OFFICIAL_RESULTS} first"
            ) from None
        except (ValueError, KeyError, TypeError):
            raise EvaluationError(
                f"{path}: is not the output of GenEval's scorer (JSON lines with 'filename')"
            ) from None
        official.check_stamp(images, OFFICIAL_RESULTS, required=False)
        inside = official.check_root(images, path, names, depth=3)
        official.check_names(path, inside, (e["path"] for e in images.entries))
        verdicts = dict(zip(inside, rows, strict=True))
        metadata = {r.id: r.metadata for r in images.records}
        found = []
        for e in images.entries:
            row = verdicts[e["path"]]
            if not isinstance(row.get("correct"), bool):
                raise ImageSetError(f"{path}: holds no verdict on {e['path']}; run the official scorer again")
            for key in ("prompt", "tag"):
                if row.get(key) != e[key]:
                    raise ImageSetError(
                        f"{path}: is of other pictures ({e['path']} has the {key} '{row.get(key)}', here it is "
                        f"'{e[key]}')"
                    )
            if _decoded(row.get("metadata")) not in (None, metadata[e["prompt_id"]]):
                raise ImageSetError(f"{path}: is of other prompts ({e['path']} was judged by other clauses)")
            reason = " ".join(str(row.get("reason") or "").split())
            found.append(Judgement(e["prompt_id"], e["tag"], e["sample"], e["seed"], float(row["correct"]), reason))
        return found


def _decoded(metadata: Any) -> Any:
    """The scorer writes the clauses as a JSON text inside its JSON; None where there are none."""
    try:
        return json.loads(metadata) if isinstance(metadata, str) else metadata
    except ValueError:
        return metadata


class _ColorTable:
    """Colours by detection; two detections that are equal in everything but their masks may differ in colour."""

    def __init__(self, detections: Sequence[Detection], colors: Sequence[str]) -> None:
        self._colors = {id(d): c for d, c in zip(detections, colors, strict=True)}

    def __getitem__(self, d: Detection) -> str:
        return self._colors[id(d)]


def _classes(metadata: dict[str, Any]) -> list[str]:
    clauses = [*metadata.get("include", ()), *metadata.get("exclude", ())]
    return list(dict.fromkeys(c["class"] for c in clauses))
