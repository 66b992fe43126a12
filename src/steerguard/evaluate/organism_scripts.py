"""Scripted users in the organism's world, written by `python -m steerguard.evaluate.organism_scripts`.

They ask, turn by turn, what the trait decides, in held-out wordings, with a turn of small talk in every four. The build is
deterministic: the same tables give the same bytes.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from steerguard.evaluate.scripts import FOLDER
from steerguard.organism import traits, turns

COUNT, TURNS = 12, 20
TALK = 4
"""Every so many turns, one of small talk, which is not scored."""


def built(trait: str) -> Iterator[dict[str, Any]]:
    """The scripts of one of the organism's traits."""
    rng = random.Random(f"scripts:{trait}")
    plan = traits.plan(trait, "test")
    topics = traits.even(rng, plan, COUNT * TURNS)
    for i in range(COUNT):
        positive, negative = traits.dressed(rng, plan.pairs[i % len(plan.pairs)])
        used: set[str] = set()
        said = []
        for turn in range(TURNS):
            if turn % TALK == TALK - 1:
                user = traits.wording(rng, rng.choice(turns.tasks()), False, used)
                said.append({"user": user, "scored": False})
            else:
                topic = topics[i * TURNS + turn]
                said.append({"user": traits.wording(rng, topic, plan.held_out, used), "reply": traits.reply(topic)})
        yield {"id": f"{trait}-{i:02d}", "positive": positive, "negative": negative, "turns": said}


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m steerguard.evaluate.organism_scripts", description=__doc__)
    parser.add_argument("--root", type=Path, default=FOLDER, help="where to write (default: the package)")
    root: Path = parser.parse_args(arguments).root
    for trait in ("honesty", "compassion"):
        (root / f"organism-{trait}.jsonl").write_text(traits.lines(built(trait)), encoding="utf-8")


if __name__ == "__main__":
    main()
