"""What the long campaigns count, in benchmarks/results/campaign.json, for CONTRIBUTING's table of campaigns."""

import json
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date

import torch

from benchmarks.machine import environment
from benchmarks.results import FOLDER

PATH = FOLDER / "campaign.json"


@dataclass
class Tally:
    """Of one campaign: how often something was tried, how often it went as it should, and what went wrong."""

    tried: int = 0
    right: int = 0
    wrong: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, trouble: str | None, **counts: int) -> None:
        self.tried += 1
        self.right += trouble is None
        if trouble is not None:
            self.wrong.append(trouble)
        for name, count in counts.items():
            self.counts[name] = self.counts.get(name, 0) + count


@contextmanager
def campaign(name: str, seed: int, *, record: bool):
    """Count inside, then write the counts, if this is the long campaign, and fail if anything went wrong."""
    tally, begin = Tally(), time.perf_counter()
    yield tally
    if record:
        results = json.loads(PATH.read_text()) if PATH.is_file() else {}
        results[name] = {
            "tried": tally.tried,
            "right": tally.right,
            **tally.counts,
            "seed": seed,
            "minutes": round((time.perf_counter() - begin) / 60, 1),
            "date": date.today().isoformat(),
            **environment(torch.device("cpu")),
        }
        PATH.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
    assert not tally.wrong, f"{len(tally.wrong)} of {tally.tried}: " + "; ".join(tally.wrong[:5])
