"""Prompts: the paper's 7,232, any user's own, their hashes, splits and overlaps.

The paper (arXiv 2412.18653, section 4) calibrates on 1,632 PartiPrompts and the 8 x 700 train prompts of
T2I-CompBench. Prompts are all it takes: no image is ever read.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tritflow.calibration.artifacts import write_bytes
from tritflow.calibration.prompt_sources import (
    FILES,
    PromptsError,
    SourceFile,
    prompts_folder,
)

PAPER_COUNT = 7232


@dataclass(frozen=True)
class Prompt:
    """One prompt and where it comes from.

    Attributes:
        text: as written by its source, stripped.
        source: `partiprompts`, `t2i_compbench`, `geneval`, or the name of the user's file.
        category: the source's own category or tag.
        split: `train`, `val` or `test`.
    """

    text: str
    source: str
    category: str = ""
    split: str = "train"


@dataclass(frozen=True)
class PromptSet(Sequence[Prompt]):
    """An ordered set of prompts with a name.

    Attributes:
        name: for meta.json and messages.
        prompts: in order; duplicates are kept as their sources have them.
    """

    name: str
    prompts: tuple[Prompt, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: Any) -> Any:
        return self.prompts[index]

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)

    @property
    def texts(self) -> list[str]:
        """The prompts' texts in order."""
        return [p.text for p in self.prompts]

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the prompts.jsonl that `write` makes of this set."""
        return hashlib.sha256(self._jsonl()).hexdigest()

    @property
    def counts(self) -> dict[str, int]:
        """How many prompts each `source/split` holds, sorted by name."""
        return dict(sorted(Counter(f"{p.source}/{p.split}" for p in self.prompts).items()))

    def select(self, *, source: str | None = None, category: str | None = None, split: str | None = None) -> PromptSet:
        """The prompts that agree with every argument given."""
        wanted = {"source": source, "category": category, "split": split}
        chosen = tuple(p for p in self.prompts if all(v is None or getattr(p, k) == v for k, v in wanted.items()))
        return PromptSet(self.name, chosen)

    def sample(self, count: int, seed: int = 0) -> PromptSet:
        """`count` of the prompts, chosen by hash of seed and place, in their order (all of them if 0 or fewer)."""
        if count <= 0 or count >= len(self):
            return self
        ranked = sorted(range(len(self)), key=lambda i: hashlib.sha256(f"{seed}/{i}".encode()).digest())
        return PromptSet(self.name, tuple(self.prompts[i] for i in sorted(ranked[:count])))

    def trajectories(self, count: int, seed: int = 0) -> PromptSet:
        """A prompt for each of `count` trajectories: a sample, or where there are too few, all of them again and again.

        The first rounds hold every prompt, the last one a sample of them (0 or fewer: every prompt once).
        """
        rounds, rest = divmod(max(count, 0), max(1, len(self)))
        if not rounds or not len(self):
            return self.sample(count, seed)
        last = self.sample(rest, seed).prompts if rest else ()
        return PromptSet(self.name, self.prompts * rounds + last)

    def describe(self) -> dict[str, Any]:
        """Name, count, hash and counts by source and split: what meta.json keeps."""
        return {"name": self.name, "count": len(self), "sha256": self.sha256, "counts": self.counts}

    def write(self, path: Path | str) -> Path:
        """Write prompts.jsonl atomically, one prompt a line."""
        path = Path(path)
        write_bytes(path, self._jsonl())
        return path

    def _jsonl(self) -> bytes:
        lines = (json.dumps(asdict(p), ensure_ascii=False, sort_keys=True) for p in self.prompts)
        return "".join(line + "\n" for line in lines).encode()


def paper_prompts(folder: Path | str | None = None) -> PromptSet:
    """The paper's calibration set: 1,632 PartiPrompts and 5,600 T2I-CompBench train prompts.

    Args:
        folder: with `partiprompts/` and `t2i_compbench/` in it (None: the cache that `fetch` fills).

    Raises:
        PromptsError: a file is missing or is not the pinned one.
    """
    chosen = [f for f in FILES if f.suite == "partiprompts" or f.name.endswith("_train.txt")]
    return PromptSet("paper-7232", _read(chosen, folder))


def suite_prompts(suite: str, folder: Path | str | None = None) -> PromptSet:
    """All prompts of one suite: `partiprompts`, `t2i_compbench` (train and val) or `geneval`, or the `paper`'s.

    A hyphen in a name counts as an underscore.

    Raises:
        PromptsError: unknown suite, missing or damaged files.
    """
    from tritflow.config import nearest

    suite = suite.replace("-", "_")
    known = sorted({f.suite for f in FILES})
    if suite == "paper":
        return paper_prompts(folder)
    if suite not in known:
        raise PromptsError(f"no prompt suite '{suite}'{nearest(suite, known)} (known: paper, {', '.join(known)})")
    return PromptSet(suite, _read([f for f in FILES if f.suite == suite and f.prompts], folder))


def load_prompts(path: Path | str) -> PromptSet:
    """Prompts from a .txt (one a line), a .jsonl (`text` or `prompt` a line), or a folder.

    A folder is either one with a `prompts.jsonl` or one with the paper's files.

    Raises:
        PromptsError: nothing there, nothing in it, or a line that is not what the format says.
    """
    path = Path(path)
    if path.is_dir():
        inside = path / "prompts.jsonl"
        return load_prompts(inside) if inside.is_file() else paper_prompts(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise PromptsError(f"{path}: {reason}; give a .txt, a .jsonl or a folder of prompts") from None
    numbered = [(i, line.strip()) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    if path.suffix == ".jsonl":
        prompts = tuple(_from_json(line, f"{path}:{i}", path.stem) for i, line in numbered)
    else:
        prompts = tuple(Prompt(line, source=path.stem) for _, line in numbered)
    if not prompts:
        raise PromptsError(f"{path} holds no prompt")
    return PromptSet(path.stem, prompts)


def from_texts(texts: Iterable[str], name: str = "custom") -> PromptSet:
    """A set of plain strings. Raises `PromptsError` if there is none, or a blank one."""
    prompts = tuple(Prompt(t.strip(), source=name) for t in texts)
    if not prompts or not all(p.text for p in prompts):
        raise PromptsError(f"the prompt set '{name}' is empty or holds a blank prompt")
    return PromptSet(name, prompts)


def normalise(text: str) -> str:
    """Case, punctuation at the ends and runs of white space do not make two prompts different."""
    return re.sub(r"\s+", " ", text).strip().strip(".,;:!?\"'").strip().casefold()


def overlap(a: Iterable[Prompt | str], b: Iterable[Prompt | str]) -> list[str]:
    """Normalised texts that are in both, sorted. Non-empty means scores on `b` after training on `a` flatter."""

    def texts(prompts: Iterable[Prompt | str]) -> set[str]:
        return {normalise(p if isinstance(p, str) else p.text) for p in prompts}

    return sorted(texts(a) & texts(b))


def _read(files: Iterable[SourceFile], folder: Path | str | None) -> tuple[Prompt, ...]:
    where = prompts_folder() if folder is None else Path(folder)
    return tuple(prompt for file in files for prompt in _parse(file, file.read(where)))


def _parse(file: SourceFile, text: str) -> list[Prompt]:
    if file.suite == "partiprompts":
        rows = csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
        found = [Prompt(r["Prompt"].strip(), file.suite, r["Category"]) for r in rows]
    elif file.suite == "geneval":
        records = [json.loads(line) for line in text.splitlines() if line.strip()]
        found = [Prompt(r["prompt"].strip(), file.suite, r["tag"], "test") for r in records]
    else:
        category, split = file.name.removesuffix(".txt").rsplit("_", 1)
        lines = [line.strip() for line in text.splitlines()]
        found = [Prompt(line, file.suite, category, split) for line in lines if line]
    if len(found) != file.prompts:
        raise PromptsError(f"{file.name} holds {len(found)} prompts, {file.prompts} were expected")
    return found


def _from_json(line: str, where: str, source: str) -> Prompt:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise PromptsError(f"{where} is not JSON: {error.msg}") from None
    text = record.get("text", record.get("prompt")) if isinstance(record, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise PromptsError(f'{where} has no "text" (or "prompt") with words in it')
    extra = {k: str(record[k]) for k in ("source", "category", "split") if k in record}
    return Prompt(text.strip(), **{"source": source, **extra})
