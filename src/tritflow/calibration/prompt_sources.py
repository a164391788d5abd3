"""Where the prompt suites lie, file by file: project, commit, path and SHA-256. Nothing of them is vendored.

A folder of these files (`partiprompts/PartiPrompts.tsv`, `t2i_compbench/color_train.txt`, ...) is either given
by the user or fetched once into the cache; both are held to the same checksums.
"""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tritflow.calibration.artifacts import write_bytes

CATEGORIES = ("color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex")

_PARTI = ("google-research/parti", "5a657978134374ce28973948331b319adef164bd", "Apache-2.0")
_COMPBENCH = ("Karine-Huang/T2I-CompBench", "1b7094991a57f3c22abdd4f6e8ba6c1a15517073", "MIT")
_GENEVAL = ("djghosh13/geneval", "af4902f24d3ca90ebbb446dd9891a59e0f82725f", "MIT")

_COMPBENCH_SHA256 = {
    "3d_spatial_train": "0bba7e9ad31b0ce7908f6cbf2426a4b7ef6e8b841c1b737d0ad2d5b8e688dd93",
    "3d_spatial_val": "c9953597315f36a5fcb41291bb19bdc6ab5f64a0fa760d691b4854a73f5d1fe9",
    "color_train": "db5d3287027d453f8c977f0c7315f8a01a770f02f61fa54ae19406762982393f",
    "color_val": "1634259756dbc77d13093d907d414480080ec9790a8c97ad09efaea7b2534f2d",
    "complex_train": "d214ac45cb3c5307dd14a144c8c69aa5ffdcc7be74ff71b5dac989f8ca9f924b",
    "complex_val": "1b808018b8d9916db3d47d5aa2ef18377a3549a56901a474156f799824cdf3b4",
    "non_spatial_train": "dbac5a9ec83204dcd0c3538a12d3212e2ce66db6f7ba45b49a1d869b2d3f2430",
    "non_spatial_val": "04c56cc9ac441dc9ea6c5157652058bd1635b5308526dd31bb29a1caab9a758d",
    "numeracy_train": "f66bb8708cb0be23c0406e14d892b25661b2b71e3e72abddc79c38466ab629c6",
    "numeracy_val": "dad8df141604b70ba7554bec724e3db0a80023680769b5c514854ea2d2527bbe",
    "shape_train": "451bdfccd330d4cf979d45664817be7959e89250b93d5c591cc562b858175a87",
    "shape_val": "37e1a276906c7ea9516cbd7ac8501be896006c0c17ca7344f260562834455bae",
    "spatial_train": "af14cdf2320057d98f94077e6211c2ddfaabfbb9e3842873657baabb17e00de6",
    "spatial_val": "8707a1d7e42ce3002d95363cf55f74bd043c843ae27108f5125aaaa7840ca988",
    "texture_train": "4846315c5972f9e9cc82e4833099e8ec2c28b999ca77269512715f3f56bde54f",
    "texture_val": "fbb5363515b4a28009e360afaaaf389d2dd2289e50dbb0c6ef4ea0c7fe4f3d4f",
}


class PromptsError(ValueError):
    """A prompt file is missing, damaged, empty or could not be fetched. The message names it and the way out."""


@dataclass(frozen=True)
class SourceFile:
    """One file of a suite.

    Attributes:
        suite: `partiprompts`, `t2i_compbench` or `geneval`; also the folder it lies in here.
        name: file name.
        project: owner/name of the project that publishes it.
        commit: 40 hex digits.
        path: inside the project.
        sha256: of the file's bytes.
        licence: of the project.
        prompts: how many it holds (0: no prompts but an accompanying list).
    """

    suite: str
    name: str
    project: str
    commit: str
    path: str
    sha256: str
    licence: str
    prompts: int

    @property
    def url(self) -> str:
        """The raw file at the pinned commit, from the project itself."""
        return f"https://raw.githubusercontent.com/{self.project}/{self.commit}/{self.path}"

    @property
    def origin(self) -> str:
        """`owner/name@commit/path`, for results."""
        return f"{self.project}@{self.commit}/{self.path}"

    def at(self, folder: Path) -> Path:
        """Where the file lies below a prompts folder."""
        return folder / self.suite / self.name

    def read(self, folder: Path) -> str:
        """The file's text. Raises `PromptsError` unless it is there and has the pinned checksum."""
        path = self.at(folder)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise PromptsError(
                f"{path}: {error.strerror or error}; run `tritflow prompts fetch`, or give a folder with it"
            ) from None
        found = hashlib.sha256(data).hexdigest()
        if found != self.sha256:
            raise PromptsError(
                f"{path}: SHA-256 is {found[:16]}..., expected {self.sha256[:16]}...; the file is not the one of "
                f"{self.project} at {self.commit[:10]}: fetch it again"
            )
        return data.decode("utf-8")


FILES: tuple[SourceFile, ...] = (
    SourceFile(
        "partiprompts",
        "PartiPrompts.tsv",
        *_PARTI[:2],
        "PartiPrompts.tsv",
        "fab29e41bb512a169b56acab4cf2a41dcb675e285df2efcde6640c7dd3c440eb",
        _PARTI[2],
        1632,
    ),
    *(
        SourceFile(
            "t2i_compbench",
            f"{category}_{split}.txt",
            *_COMPBENCH[:2],
            f"examples/dataset/{category}_{split}.txt",
            _COMPBENCH_SHA256[f"{category}_{split}"],
            _COMPBENCH[2],
            700 if split == "train" else 300,
        )
        for split in ("train", "val")
        for category in CATEGORIES
    ),
    SourceFile(
        "geneval",
        "evaluation_metadata.jsonl",
        *_GENEVAL[:2],
        "prompts/evaluation_metadata.jsonl",
        "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13",
        _GENEVAL[2],
        553,
    ),
    SourceFile(
        "geneval",
        "object_names.txt",
        *_GENEVAL[:2],
        "evaluation/object_names.txt",
        "608f6a0e5c8ca1c7a92b818430141fe268c85b7930b50f4160f1d65893b5bacd",
        _GENEVAL[2],
        0,
    ),
)


def cache_folder() -> Path:
    """`$TRITFLOW_CACHE`, or `tritflow` below `$XDG_CACHE_HOME`, or `~/.cache/tritflow`."""
    if explicit := os.environ.get("TRITFLOW_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tritflow"


def prompts_folder() -> Path:
    """Where `fetch` puts the files unless told otherwise."""
    return cache_folder() / "prompts"


def fetch(
    folder: Path | None = None,
    *,
    files: Iterable[SourceFile] = FILES,
    timeout: float = 30.0,
    on_file: Callable[[SourceFile, str], None] | None = None,
) -> Path:
    """Download what is missing or damaged, each file held to its checksum and put in place atomically.

    Args:
        folder: where (None: the cache).
        files: which files.
        timeout: seconds for one connection.
        on_file: called as (file, "present" | "fetched").

    Returns:
        the folder.

    Raises:
        PromptsError: the network or the project is out of reach, or what came is not the pinned file.
    """
    folder = prompts_folder() if folder is None else Path(folder)
    for file in files:
        path = file.at(folder)
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == file.sha256:
            state = "present"
        else:
            write_bytes(path, _download(file, timeout))
            state = "fetched"
        if on_file is not None:
            on_file(file, state)
    return folder


def _download(file: SourceFile, timeout: float) -> bytes:
    try:
        with urllib.request.urlopen(file.url, timeout=timeout) as answer:
            data: bytes = answer.read()
    except (urllib.error.URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise PromptsError(
            f"cannot fetch {file.name} from {file.project}: {reason}; "
            "without a network, give a folder that holds the files with --prompts"
        ) from None
    found = hashlib.sha256(data).hexdigest()
    if found != file.sha256:
        raise PromptsError(
            f"{file.name} from {file.project} has SHA-256 {found[:16]}..., expected {file.sha256[:16]}...: not kept"
        )
    return data
