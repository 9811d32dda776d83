"""What a load run is asked, and what it found on one gateway, held to the targets: as text, JSON and Markdown.

Knows nothing about how a gateway is started.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import load

ROUTING_MS, REASON = "x-arllm-routing-ms", "x-arllm-decision-reason"
WATCH = (ROUTING_MS, REASON)
QUERIES = (
    "What is 17 * 23?",
    "Write a haiku about autumn.",
    "Which enzyme unwinds DNA, and in which direction does it move along the strand?",
    "not ( True and False ) and ( not True ) is",
    "Today is the 28th of February 2023. What is the date in ten days?",
    "Summarize in one sentence why the sky is blue. " * 4,
)
# Overload: a router that takes so long, with one thread, is asked more often than it can answer; the gateway is not.
SLOW_MS, DEADLINE_MS, CROWD, PER_SECOND = 50.0, 100.0, 32, 64.0
BEYOND_DEADLINE_MS = 5.0  # the target for p99 of what overload adds
SHARE = 0.25  # of the seconds, for overload
ALONE = 0.5  # and for the first level, which is judged, and whose differences are the smallest
# Seconds of its slices. Short, so that the arms stand close together and there are many rounds: in one run each, the
# median's standard error was 0.2 ms at 0.1 s (175 rounds) and 0.4 at 1 s (17); the medians were 2.4 and 2.2 ms.
SLICE = 0.1


@dataclass(frozen=True)
class Plan:
    """``seconds``: of load on one gateway, both arms together; what has to start comes on top."""

    bundle: str
    clients: tuple[int, ...]
    seconds: float

    async def compare(
        self, plain: load.Target, routed: load.Target, slow: load.Target, beside: load.Target | None = None
    ) -> tuple[list[load.Level], load.Level]:
        """(rising concurrency, overload); ``slow`` is an arm whose router takes ``SLOW_MS``; ``beside`` stands
        beside the first level.
        """
        first, *others = self.clients
        alone, rest = (ALONE, 1 - SHARE - ALONE) if others else (1 - SHARE, 0.0)
        rising = await load.compare(plain, routed, [first], self.seconds * alone, slice_seconds=SLICE, beside=beside)
        if others:
            rising += await load.compare(plain, routed, others, self.seconds * rest)
        (overload,) = await load.compare(plain, slow, [CROWD], self.seconds * SHARE, PER_SECOND)
        return rising, overload


@dataclass(frozen=True)
class Found:
    """Levels of one gateway. ``limit_ms``: what routing may add, median, where nothing else waits."""

    gateway: str
    limit_ms: float
    rising: Sequence[load.Level]
    overload: load.Level

    @property
    def failed(self) -> int:
        return load.failed([*self.rising, self.overload])

    def targets(self) -> dict[str, bool]:
        """Each target, with what was measured, and whether it is met."""
        first, last = (load.as_json([level])[0] for level in (self.rising[0], self.overload))
        (low, alone, high), worst = first["added_p50_ms_by_slice"], last["added_ms"]["p99"]
        spread = f"quartiles {low:+.2f} and {high:+.2f} of {first['rounds']} rounds"
        most = DEADLINE_MS + BEYOND_DEADLINE_MS
        return {
            f"{self.failed} failed requests; 0 allowed": self.failed == 0,
            f"{alone:+.2f} ms p50 ({spread}), {first['concurrency']} at a time; at most {self.limit_ms:g}": alone
            <= self.limit_ms,
            f"{worst:+.2f} ms p99 at overload; at most {most:g}": worst <= most,
        }

    def as_json(self) -> dict[str, Any]:
        rows = [{**row, **_told(level)} for row, level in zip(self._rows(), self._levels(), strict=True)]
        return {
            "gateway": self.gateway,
            "levels": rows[:-1],
            "overload": {"router_ms": SLOW_MS, "deadline_ms": DEADLINE_MS, "per_second": PER_SECOND, **rows[-1]},
            "failed": self.failed,
            "targets": self.targets(),
        }

    def text(self) -> str:
        """For a terminal; p50 / p95 / p99 in milliseconds."""
        lines = [f"{self.gateway}, without and with arllm; p50 / p95 / p99", load.table(self.rising)]
        lines += [overload_is(), load.table([self.overload])]
        lines += [f"{level.concurrency} clients: arllm's own {_own(level)}" for level in self._levels()]
        return "\n".join([*lines, *self._judged()])

    def markdown(self) -> str:
        head = "| clients | without, ms | with, ms | added, ms | ratio | requests/s | arllm's own, ms | decisions |"
        lines = [f"## {self.gateway}", "", head, "|" + "---|" * 8]
        for level, row in zip(self._levels(), self._rows(), strict=True):
            quantiles = [_triple(row[key], form) for key, form in _COLUMNS.items()]
            rates = " / ".join(f"{rate:.0f}" for rate in row["per_second"])
            told = _told(level)
            name = f"{level.concurrency}{', overload' if level is self.overload else ''}"
            cells = [name, *quantiles, rates, _triple(told["routing_ms"], ".2f"), _reasons(told)]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join([*lines, "", *(f"- {line}" for line in self._judged())])

    def _levels(self) -> list[load.Level]:
        return [*self.rising, self.overload]

    def _rows(self) -> list[dict[str, Any]]:
        return load.as_json(self._levels())

    def _judged(self) -> list[str]:
        told = [f"{'met' if met else 'MISSED'}: {target}" for target, met in self.targets().items()]
        beside = load.as_json([self.rising[0]])[0]["beside_added_p50_ms_by_slice"]
        if beside is not None:
            low, middle, high = beside
            told.append(
                f"beside that, judged by nothing: a callback that does nothing adds {middle:+.2f} ms p50 "
                f"(quartiles {low:+.2f} and {high:+.2f}), {self.rising[0].concurrency} at a time"
            )
        return told


_COLUMNS = {"plain_ms": ".2f", "routed_ms": ".2f", "added_ms": "+.2f", "ratio": ".2f"}


def overload_is() -> str:
    """The overload that is measured, in words."""
    return (
        f"overload: a router of {SLOW_MS:g} ms with one thread, a deadline of {DEADLINE_MS:g} ms, and "
        f"{CROWD} clients that ask {PER_SECOND:g} times a second"
    )


def _told(level: load.Level) -> dict[str, Any]:
    """What arllm says of itself: milliseconds, and how it decided."""
    taken = [float(value) for value in level.routed.watched[ROUTING_MS] if value]
    reasons = Counter(reason or "without arllm" for reason in level.routed.watched[REASON])
    return {"routing_ms": load.percentiles(taken), "reasons": dict(reasons)}


def _reasons(told: Mapping[str, Any]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in told["reasons"].items())


def _own(level: load.Level) -> str:
    told = _told(level)
    return f"{_triple(told['routing_ms'], '.2f')} ms; {_reasons(told)}"


def _triple(values: Mapping[str, float], form: str) -> str:
    return " / ".join(format(value, form) for value in values.values())
