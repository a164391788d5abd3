"""`python -m tritflow.training.prompts FILE`: captions of the built-in world for a student, many in invented words.

A teacher that learned shapes between shapes and hues between hues draws pairs, counts and colours that no caption of
its training named. A student that hears plain captions alone does not learn that from it. These prompts say what the
teacher was told: `blends` and `tints` in invented words, no held-out combination among them.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from tritflow.formats.atomic import write_atomic
from tritflow.training import data
from tritflow.training.models import RUNES
from tritflow.training.options import mixture_arguments, mixture_of

# Not a stream that a teacher is trained on.
SEED = 9_000_011


def prompts(count: int, mixture: data.Mixture, seed: int = 0, workers: int = 1) -> list[str]:
    """`count` captions, the same for the same settings, whatever `workers` is.

    Args:
        count: how many.
        mixture: what their scenes hold.
        seed: of the stream.
        workers: processes that draw.
    """
    examples = data.make_examples(count, SEED + seed, workers, mixture)
    invented, clip = data.invented_words(), data.word_tokenizers()[0]
    return [invented.text(ids, clip) for ids in examples.clip_ids.tolist()]


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tritflow.training.prompts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, help="a .txt to write, for `tritflow quantize --prompts`")
    parser.add_argument("--count", type=int, default=49_152)
    mixture_arguments(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    args = parser.parse_args(argv)
    if args.file.suffix != ".txt":
        parser.error(f"{args.file}: give a name that ends in .txt")
    if args.count < 1:
        parser.error(f"--count {args.count}: give at least 1")
    found = prompts(args.count, mixture_of(parser, args), args.seed, args.workers)
    args.file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(args.file, ("\n".join(found) + "\n").encode())
    told = sum(any(c in RUNES for c in text) for text in found)
    print(f"{args.file}: {len(found):,} prompts, {told:,} of them with invented words")


if __name__ == "__main__":
    main()
