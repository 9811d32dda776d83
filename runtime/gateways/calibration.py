"""What a variant takes on this machine: measured at the start, told in the log. Knows nothing about bundles.

The machine may be busy meanwhile, and a burst of other work is not the router's doing. So all lengths are measured in
each of several short rounds, the first round counts nothing, and the median of the others decides.
"""

from __future__ import annotations

import itertools
import math
import random
import string
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

# Bytes of the texts: letters and digits at random, about two bytes a token, so that real text of the same length is
# never slower; and a text longer than any that an encoder reads whole.
LENGTHS = (32, 64, 128, 256, 512)
LONGEST = 1 << 15
ROUNDS = 5  # that count
RUNS, SECONDS = 20, 0.02  # of one length in one round: at most so many runs, and no more once so long has passed
HOPELESS = 4  # times the limit in the event loop: a length that never took less ends a round but for the longest
TAIL = 3  # the default deadline in p99s
LEAST_DEADLINE = 0.010  # seconds; below, the scheduler decides


@dataclass(frozen=True)
class Calibration:
    """What this variant takes on this machine, in seconds.

    Attributes:
        inline_bytes: texts up to this length are routed within ``limit`` (median), so in the event loop; 0 = none.
        p99: of the longest query that the encoder reads.
        limit: the operator's, of a query in the event loop.
        typical: of the length ``inline_bytes``, or of the shortest where that is 0.
    """

    inline_bytes: int
    p99: float
    limit: float
    typical: float

    @property
    def default_deadline(self) -> float:
        """Seconds: some p99s, so that it is the router that has failed where it passes; and no less than a floor."""
        return max(LEAST_DEADLINE, TAIL * self.p99)

    def told(self, deadline: float, *, by_operator: bool) -> str:
        """What was chosen and why, for the log."""
        limit = f"a median of {self.typical * 1e3:.2f} ms, the limit is {self.limit * 1e3:g}"
        if self.inline_bytes == 0:
            place = f"all queries run in threads ({LENGTHS[0]} bytes took {limit})"
        elif self.inline_bytes >= LONGEST:
            place = f"all queries run in the event loop (the longest took {limit})"
        else:
            place = f"queries up to {self.inline_bytes} bytes run in the event loop ({limit}), others in threads"
        if by_operator:
            why = f"as set; the longest query's p99 is {self.p99 * 1e3:.2f} ms"
        elif deadline > LEAST_DEADLINE:
            why = f"{TAIL} times the longest query's p99"
        else:
            why = f"the least; the longest query's p99 is {self.p99 * 1e3:.2f} ms"
        return f"{place}; deadline {deadline * 1e3:.1f} ms: {why}"


def measure(
    route: Callable[[str], object], limit: float, clock: Callable[[], float] = time.perf_counter
) -> Calibration:
    """Time ``route`` on texts of growing length.

    Args:
        limit: seconds of a query that may run in the event loop.
        clock: seconds, monotonic.
    """
    letters = random.Random(0)
    texts = {n: "".join(letters.choices(string.ascii_letters + string.digits + "   ", k=n)) for n in LENGTHS}
    texts[LONGEST] = "warm up " * (LONGEST // 8)
    rounds = [_round(route, texts, HOPELESS * limit, clock) for _ in range(1 + ROUNDS)][1:]
    typical = {length: median(median(taken.get(length, [math.inf])) for taken in rounds) for length in texts}
    inline = max(itertools.takewhile(lambda length: typical[length] <= limit, texts), default=0)
    p99 = median(taken[LONGEST][math.ceil(0.99 * len(taken[LONGEST])) - 1] for taken in rounds)
    return Calibration(inline, p99, limit, typical[inline or LENGTHS[0]])


def _round(
    route: Callable[[str], object], texts: Mapping[int, str], hopeless: float, clock: Callable[[], float]
) -> dict[int, list[float]]:
    """Seconds of each run, ascending, by length: up to the first that is hopeless, and of the longest."""
    found: dict[int, list[float]] = {}
    slow = False
    for length, text in texts.items():
        if slow and length != LONGEST:
            continue
        taken: list[float] = []
        while not taken or (len(taken) < RUNS and sum(taken) < SECONDS):
            started = clock()
            route(text)
            taken.append(clock() - started)
        found[length] = sorted(taken)
        slow = min(taken) > hopeless
    return found
