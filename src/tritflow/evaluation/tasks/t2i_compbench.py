"""T2I-CompBench: eight categories of 300 prompts with ten pictures each, every category with its own kind of score.

Pictures lie as the project's scripts read them, one folder a category: `color/samples/a red cup_000017.png`, the
number counting the category's pictures. The models that score here are current transformers classes; where they are
not what the scripts ran they are named as substitutes. The scripts' own output in the same folder can be read back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tritflow.calibration.prompt_sources import CATEGORIES, FILES, SourceFile, prompts_folder
from tritflow.evaluation import official
from tritflow.evaluation.api import NO_OPTIONS, EvaluationError, Judgement, Progress, PromptRecord, Task, TaskOptions
from tritflow.evaluation.images import ImageSet, ImageSetError
from tritflow.evaluation.ledger import Ledger
from tritflow.evaluation.scorers.detection import Detection
from tritflow.evaluation.scorers.loading import Entry, Pixels, batches
from tritflow.evaluation.tasks import compbench_language as language
from tritflow.evaluation.tasks import compbench_rules as rules

SAMPLES = 10
ATTRIBUTES = ("color", "shape", "texture")
GRADED_BY_JUDGE = ("non_spatial", "complex")

Scores = list[tuple[float, str]]
"""(score, why it is low) of each picture of a batch."""

Scorer = Callable[[Sequence[Entry], Sequence[Pixels]], Scores]

# Where the suite's scripts leave a category's scores, below the category's folder.
_OFFICIAL = {
    **dict.fromkeys(ATTRIBUTES, "annotation_blip/vqa_result.json"),
    "spatial": "labels/annotation_obj_detection_2d/vqa_result.json",
    "3d_spatial": "labels/annotation_obj_detection_3d/vqa_result.json",
    "numeracy": "annotation_num/vqa_result.json",
    **dict.fromkeys(GRADED_BY_JUDGE, "sharegpt4v/vqa_result.json"),
}


class CompBenchTask(Task):
    """The suite of Huang et al. 2023 (arXiv 2307.06350) and 2025 (T2I-CompBench++)."""

    name = "t2i-compbench"
    version = 1
    tags = CATEGORIES
    overall_tags = CATEGORIES
    graded = True
    roles = ("vqa", "detector", "depth", "judge", "parser")
    splits = ("val", "train")
    default_samples = SAMPLES

    def __init__(self, options: TaskOptions = NO_OPTIONS) -> None:
        super().__init__(options)
        self._given: Mapping[str, Any] = {}
        self.scorers = {}
        self.substitutes = {}

    def prompts(
        self, split: str = "val", per_tag: int | None = None, seed: int = 0, tags: Sequence[str] | None = None
    ) -> list[PromptRecord]:
        """300 (val) or 700 (train) prompts a category, in the files' order; with `per_tag` the first ones.

        Raises `PromptsError` when a file is not there or not the pinned one.
        """
        records = []
        for category in self.check_tags(tags):
            file = self._file(category, split)
            lines = file.read(self.options.prompts or prompts_folder()).splitlines()
            texts = [line.strip() for line in lines if line.strip()]
            for i, text in enumerate(texts[:per_tag]):
                records.append(PromptRecord(f"{category}-{split}-{i:04d}", category, text, {"number": i}))
        return records

    def _file(self, category: str, split: str) -> SourceFile:
        if split not in self.splits:
            raise EvaluationError(f"t2i-compbench has no split '{split}' (it has val and train)")
        return next(f for f in FILES if f.name == f"{category}_{split}.txt")

    def sources(self, split: str) -> dict[str, str]:
        files = [self._file(category, split) for category in self.tags]
        return {f.origin: f.sha256 for f in files}

    def picture_path(self, record: PromptRecord, index: int, sample: int) -> str:
        """Raises `EvaluationError` beyond `SAMPLES` pictures: the suite's numbering has no place for them."""
        if sample >= SAMPLES:
            raise EvaluationError(
                f"t2i-compbench has {SAMPLES} pictures a prompt; take --seeds-per-prompt 1 to {SAMPLES}"
            )
        # The scripts split names at underscores and paths at slashes; no prompt of the suite has either.
        text = record.text.replace("_", " ").replace("/", " ")
        return f"{record.tag}/samples/{text}_{record.metadata['number'] * SAMPLES + sample:06d}.png"

    def use(self, **scorers: Any) -> None:
        """Score with these objects instead of loading models, by role."""
        self._given = scorers

    def chosen_scorers(self) -> dict[str, str]:
        given = {role: str(getattr(scorer, "name", role)) for role, scorer in self._given.items()}
        return {**super().chosen_scorers(), **given}

    def score(
        self, images: ImageSet, progress: Progress | None = None, ledger: Ledger | None = None
    ) -> list[Judgement]:
        """Category by category, so that one scorer at a time is in memory; judgements in the set's order."""
        self.scorers, self.substitutes = {}, {}
        kept = Ledger() if ledger is None else ledger
        for tags, make in (
            (ATTRIBUTES, self._attributes),
            (("spatial", "numeracy", "3d_spatial"), self._objects),
            (GRADED_BY_JUDGE, self._judged),
        ):
            entries = [e for tag in tags for e in images.entries if e["tag"] == tag]
            if kept.knows(entries):
                continue
            scorer = make()
            for batch, pictures in batches(images, entries, self.options.batch_size, kept.knows):
                scored = zip(batch, scorer(batch, pictures), strict=True)
                kept.add(
                    self, batch, [Judgement(e["prompt_id"], e["tag"], e["sample"], e["seed"], *s) for e, s in scored]
                )
                if progress is not None:
                    progress(len(kept), len(images.entries))
            del scorer  # before the next one is loaded
        kept.tell(self)
        return kept.judgements(images.entries)

    def _model(self, role: str, module: Any, kind: str) -> Any:
        """The scorer of a role: one that was given, or the module's class on the chosen or default weights."""
        scorer = self._given.get(role)
        if scorer is None:
            scorer = getattr(module, kind)(self.options.scorers.get(role, module.DEFAULT), self.options.device)
        self._note(role, scorer.name, module.STANDS_FOR)
        return scorer

    def _note(self, role: str, name: str, stands_for: str | None) -> None:
        """What scores as `role`, and what the authors ran there; None where it is theirs."""
        self.scorers = {**self.scorers, role: name}
        if stands_for is not None:
            self.substitutes = {**self.substitutes, role: stands_for}

    def _attributes(self) -> Scorer:
        from tritflow.evaluation.scorers import blip_vqa

        vqa = self._model("vqa", blip_vqa, "BlipVqa")
        name, stands_for, phrases_of = language.phrase_finder(self.options.scorers.get("parser", "rules"))
        self._note("parser", name, stands_for)

        def scorer(entries: Sequence[Entry], pictures: Sequence[Pixels]) -> Scores:
            phrases = [phrases_of(e["prompt"])[: rules.MAX_PHRASES] for e in entries]
            answers = vqa.ask(pictures, phrases)
            return [
                (rules.attributes(a), "; ".join(f"{p}: {v:.2f}" for p, v in zip(mine, a, strict=True) if v < 0.5))
                for mine, a in zip(phrases, answers, strict=True)
            ]

        return scorer

    def _objects(self) -> Scorer:
        from tritflow.evaluation.scorers import dpt_depth, owlv2

        detector = self._model("detector", owlv2, "Owlv2Detector")
        minimum = getattr(detector, "confidence", owlv2.CONFIDENCE)
        depth: Any = None

        def scorer(entries: Sequence[Entry], pictures: Sequence[Pixels]) -> Scores:
            nonlocal depth
            wanted = [_names(e) for e in entries]
            boxes = detector.detect(pictures, wanted, minimum)
            height, width = pictures[0].shape[:2]
            scale = rules.FRAME / min(height, width)
            found = [[_scaled(d, scale) for d in mine] for mine in boxes]
            maps: list[Any] = [None] * len(entries)
            deep = [i for i, e in enumerate(entries) if e["tag"] == "3d_spatial"]
            if deep:
                if depth is None:
                    depth = self._model("depth", dpt_depth, "DptDepth")
                size = round(height * scale), round(width * scale)
                for i, m in zip(deep, depth.depth([pictures[i] for i in deep], *size), strict=True):
                    maps[i] = m
            return [_objects_score(e, f, m) for e, f, m in zip(entries, found, maps, strict=True)]

        return scorer

    def _judged(self) -> Scorer:
        from tritflow.evaluation.scorers import llava_judge

        judge = self._model("judge", llava_judge, "LlavaJudge")

        def scorer(entries: Sequence[Entry], pictures: Sequence[Pixels]) -> Scores:
            found: Scores = [(0.0, "")] * len(entries)
            for tag in dict.fromkeys(e["tag"] for e in entries):
                at = [i for i, e in enumerate(entries) if e["tag"] == tag]
                grades = judge.grade([pictures[i] for i in at], [entries[i]["prompt"] for i in at], tag)
                for i, g in zip(at, grades, strict=True):
                    found[i] = (rules.grade(g), "" if g >= 4 else f"graded {g} of 5")
            return found

        return scorer

    def read_official(self, images: ImageSet) -> list[Judgement]:
        """The scores that the suite's scripts left in the category folders.

        They name no folder and mostly no picture, so a stamp has to say that they are of these pictures (`official`).
        Raises `EvaluationError` when one is not there or no such output, and `ImageSetError`, naming file and picture,
        when it is of other pictures or does not have exactly one score for each.
        """
        tables: dict[str, dict[int, float]] = {}
        for tag in dict.fromkeys(e["tag"] for e in images.entries):
            left = f"{tag}/{_OFFICIAL[tag]}"
            path = images.folder / left
            rows = official.read_json(path, "the official script's output")
            try:
                scores = [(int(r["question_id"]), float(r["answer"])) for r in rows]
            except (ValueError, KeyError, TypeError):
                raise EvaluationError(f"{path}: is not the output of T2I-CompBench's scripts") from None
            official.check_stamp(images, left, required=True)
            mine = {_number(e): e for e in images.entries if e["tag"] == tag}
            if tag in ATTRIBUTES:
                # BLIP's script counts the files in the order of their numbers instead of giving the numbers.
                numbers = dict(enumerate(sorted(mine)))
                scores = [(numbers.get(k, -1), s) for k, s in scores]
            called = [str(mine[n]["path"]) if n in mine else f"question {n}" for n, _ in scores]
            official.check_names(path, called, (e["path"] for e in mine.values()))
            _check_pictures_named(images, tag)
            # The judge's script writes per cent.
            tables[tag] = {n: s / 100 if tag in GRADED_BY_JUDGE else s for n, s in scores}
        found = []
        for e in images.entries:
            score = tables[e["tag"]][_number(e)]
            if not 0 <= score <= 1:
                where = images.folder / e["tag"] / _OFFICIAL[e["tag"]]
                raise ImageSetError(f"{where}: holds no score in 0..1 of {e['path']}; run the official script again")
            found.append(Judgement(e["prompt_id"], e["tag"], e["sample"], e["seed"], score))
        return found


def _check_pictures_named(images: ImageSet, tag: str) -> None:
    """Two of the scripts also leave which pictures they saw; where that is there, it has to be these."""
    names = [str(e["path"]) for e in images.entries if e["tag"] == tag]
    questions = images.folder / tag / "annotation1_blip" / "color_test.json"
    mapping = images.folder / tag / "labels" / "annotation_obj_detection_2d" / "mapping.json"
    try:
        if tag in ATTRIBUTES and questions.exists():
            seen = [str(r["image"]) for r in official.read_json(questions, "BLIP's list of questions")]
            official.check_names(questions, official.check_root(images, questions, seen, depth=3), names)
        if tag == "spatial" and mapping.exists():
            seen = [f"{tag}/samples/{r['image']}" for r in official.read_json(mapping, "the list of pictures")]
            official.check_names(mapping, seen, names)
    except (KeyError, TypeError):
        raise EvaluationError(f"{images.folder / tag}: holds a list of pictures that is not T2I-CompBench's") from None


def _number(entry: Entry) -> int:
    return int(str(entry["path"]).rsplit("_", 1)[1].removesuffix(".png"))


def _names(entry: Entry) -> list[str]:
    """What the detector is asked for in a picture of a prompt."""
    if entry["tag"] == "numeracy":
        return [rules.detector_name(n, counting=True) for n, _ in language.counted_objects(entry["prompt"])]
    relations = language.RELATIONS_2D if entry["tag"] == "spatial" else language.RELATIONS_3D
    _, first, second = language.related_objects(entry["prompt"], relations)
    return [rules.detector_name(first), rules.detector_name(second)]


def _scaled(d: Detection, scale: float) -> Detection:
    x0, y0, x1, y1 = d.box
    return Detection(d.label, d.score, (x0 * scale, y0 * scale, x1 * scale, y1 * scale))


def _objects_score(entry: Entry, found: Sequence[Detection], depth: Any) -> tuple[float, str]:
    seen = ", ".join(dict.fromkeys(d.label for d in found)) or "nothing"
    if entry["tag"] == "numeracy":
        score = rules.numeracy(language.counted_objects(entry["prompt"]), found)
        counts = ", ".join(f"{sum(d.label == n for d in found)} {n}" for n in dict.fromkeys(d.label for d in found))
        return score, "" if score == 1 else f"found {counts or 'nothing'}"
    if entry["tag"] == "spatial":
        score = rules.spatial_2d(*language.related_objects(entry["prompt"], language.RELATIONS_2D), found)
    else:
        score = rules.spatial_3d(*language.related_objects(entry["prompt"], language.RELATIONS_3D), found, depth)
    return score, "" if score >= 0.75 else f"found {seen}"
