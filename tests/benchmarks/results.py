"""RESULTS.md from the comparisons' JSON files: pure functions of what was measured.

    python tests/benchmarks/results.py --folder out/bench --out tests/benchmarks/RESULTS.md

A comparison that left no file is a section that says so.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import of_bundles
from cells import count as _count
from cells import ms as _ms
from cells import table
from cells import times as _times
from interleave import times_faster
from known_peers import ARLLM, PEERS
from record import read

from arllm.train.latency.stats import Ratio

Found = Mapping[str, Any]

FILES = ("engines", "bundles", "published", "peers")
INTEGER_PRODUCTS = ("MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulInteger")
GEMMA = "EmbeddingGemma"
PYTORCH = "PyTorch fp32"
ROUTED = "PyTorch"  # the whole route() of the PyTorch network

# What is reached for: (title, which tables, slower arm, times as fast by tokens). The faster arm is the table's base.
GOALS = (
    ("EmbeddingGemma's shape, authored int8 vs traced int8", GEMMA, "ORT traced int8", (1.3, 1.3, 1.25, 1.6)),
    ("EmbeddingGemma's shape, authored int8 vs PyTorch fp32, unpadded", GEMMA, PYTORCH, (7.0, 5.5, 4.0, 4.0)),
    ("nano as it ships, whole route() vs PyTorch", "nano as it ships", ROUTED, (8.0, 5.0, 3.0, 3.0)),
    ("nano with 4 layers, whole route() vs PyTorch", "nano with 4 layers", ROUTED, (8.0, 5.0, 3.0, 3.0)),
)
GOAL_TOKENS = ("16", "64", "256", "512")

_WHY = "\n\nWhat is below, and what bounds it (what was tried, and comes next: [LEVERS.md](LEVERS.md)):\n\n"

HEAD = """# Who is how much faster, and why

Written by `make bench`; edits are lost. What a number means, and how to take it again, stands in the scripts beside
this file. Ratios are medians over rounds in which every arm took its turn, with their quartiles in brackets:
milliseconds belong to this machine and this hour, ratios do not.
"""


def render(found: Mapping[str, Found | None]) -> str:
    """The whole file, of the comparisons by the names in ``FILES``."""
    engines, bundles, published, peers = (found.get(name) for name in FILES)
    parts = [
        HEAD,
        _machine([one for one in (engines, bundles, published, peers) if one]),
        _engines(engines) if engines else _missing("Engines", "engines.py"),
        of_bundles.section(bundles) if bundles else _missing("Whole bundles", "bundles.py"),
        _published(published) if published else _missing("The published path", "published_path.py"),
        _peers(peers) if peers else _missing("Peers", "peers.py"),
        _again(),
    ]
    return "\n".join(part.strip() + "\n" for part in parts)


def _missing(title: str, script: str) -> str:
    return f"## {title}\n\nNot measured: `{script}` left no result here."


def _spread(ratio: Ratio) -> str:
    return f"{_times(ratio.median)} [{ratio.low:.2f}–{ratio.high:.2f}]"


# --- machine ----------------------------------------------------------------------------------------------------


def _machine(found: Sequence[Found]) -> str:
    if not found:
        return "## Machine\n\nNothing was measured."
    machine = found[0]["machine"]
    loads = [one["machine"][when] for one in found for when in ("load_before", "load_after")]
    highest = max((load[0] for load in loads if load), default=0.0)
    rows = [
        ["processor", f"{machine['cpu']}, {machine['cores']} cores; {' '.join(machine['flags'])}"],
        ["system", machine["system"]],
        ["versions", ", ".join(f"{name} {version}" for name, version in machine["versions"].items())],
        ["measured", f"{found[0]['date']} to {found[-1]['date']}"],
        ["load average", f"at most {highest:.1f}, of 1 minute, before and after each comparison"],
    ]
    text = "## Machine\n\n" + table(["what", "value"], rows)
    if any(one["clock"] == "cpu" for one in found):
        text += (
            "\n\n**Processor time of one thread**, not wall time (`ARLLM_BENCH_CLOCK=cpu`): others were at work on "
            "this machine, and only so do milliseconds come near what a quiet one shows. Caches were shared."
        )
    elif highest > machine["cores"]:
        text += (
            "\n\n**The machine was busy**: waiting for a core is in every number. Arms that use both cores "
            "suffer most; take it again on a quiet machine before believing a ratio closely."
        )
    return text


# --- engines ----------------------------------------------------------------------------------------------------


def _engines(found: Found) -> str:
    parts = [_goals(found), "## Engines\n\n" + _engine_words(found)]
    parts += [_arms(one, found["lengths"]) for one in found["encoders"]]
    parts.append(
        "## nano, whole `route()`\n\nTokenization, encoder, NIR and decision over 16 candidates, against the same "
        f"network in PyTorch behind the same code. Texts: {found['texts']}, cut to these token counts; nano as it "
        "ships reads 256 tokens of a longer text, in every arm."
    )
    for one in found["routes"]:
        parts += [_arms(one, found["lengths"]), _stages(one, found["lengths"])]
    parts.append(_profiles(found["profiles"], found["lengths"]))
    return "\n\n".join(parts)


def _engine_words(found: Found) -> str:
    words = (
        "One query of so many random tokens through the encoder, heads included; random weights, a vocabulary of "
        "32,768 rows where EmbeddingGemma has 262,144 (a query reads only its own). ORT is ONNX Runtime as arllm's "
        "runtime sets it: no spinning, no memory pattern. PyTorch is eager, with scaled dot product attention. "
        "OpenVINO reads the traced fp32 graph; its int8 is NNCF's static quantization of activations, which a real "
        f"encoder may not bear as well as scales per row. {_count(found['rounds'], 'round')}. "
        "In brackets: how many times as long as the authored int8 graph."
    )
    return words + (f"\n\nMissing: {found['missing']}." if found.get("missing") else "")


def _arms(one: Found, lengths: Sequence[int]) -> str:
    base = one["times"][one["base"]]
    rows = []
    for name, times in one["times"].items():
        cells = []
        for length in map(str, lengths):
            cell = _ms(median(times[length]))
            if name != one["base"]:
                cell += f" ({_times(times_faster(times[length], base[length]).median)})"
            cells.append(cell)
        rows.append([f"**{name}**" if name == one["base"] else name, *cells])
    threads = _count(one["threads"], "thread")
    return f"### {one['title']}, {threads}\n\n" + table(["ms by tokens", *map(str, lengths)], rows)


def _stages(one: Found, lengths: Sequence[int]) -> str:
    rows = [
        [name, *(" / ".join(_ms(ms) for ms in one["stages"][name][str(length)]) for length in lengths)]
        for name in (ROUTED, one["base"])
    ]
    return table(["tokenizing / encoding / deciding, wall ms", *map(str, lengths)], rows)


def _profiles(profiles: Found, lengths: Sequence[int]) -> str:
    text = (
        "## Where the time of the int8 graphs goes\n\nShares of the time in kernels, by ONNX Runtime's profiler, "
        f"{GEMMA}'s shape, one thread."
    )
    for name, by_length in profiles.items():
        total: dict[str, float] = {}
        for shares in by_length.values():
            for op, share in shares.items():
                total[op] = max(total.get(op, 0.0), share)
        top = [op for op, share in sorted(total.items(), key=lambda pair: -pair[1]) if share >= 0.02][:8]
        rows = [[op, *(f"{by_length[str(n)].get(op, 0.0):.0%}" for n in lengths)] for op in top]
        text += f"\n\n{table([name, *map(str, lengths)], rows)}"
    return text


# --- figures to reach -------------------------------------------------------------------------------------------


def _goals(found: Found) -> str:
    rows, notes = [], []
    for title, of, slower, wanted in GOALS:
        for one in (*found["encoders"], *found["routes"]):
            if not one["title"].startswith(of) or slower not in one["times"]:
                continue
            cells = []
            for length, goal in zip(GOAL_TOKENS, wanted, strict=True):
                if length not in one["times"][slower]:
                    cells.append("not measured")
                    continue
                ratio = times_faster(one["times"][slower][length], one["times"][one["base"]][length])
                cells.append(f"{'' if ratio.median >= goal else '**below** '}{_spread(ratio)} of {goal:g}×")
                if ratio.median < goal:
                    notes.append(_why(one, found["profiles"], slower, length, ratio.median, goal))
            rows.append([title, str(one["threads"]), *cells])
    text = "## Figures to reach\n\n" + table(["how many times as fast", "threads", *GOAL_TOKENS], rows)
    return text + (_WHY + "\n".join(notes) if notes else "")


def _why(one: Found, profiles: Found, slower: str, length: str, reached: float, goal: float) -> str:
    threads = _count(one["threads"], "thread")
    place = f"- {one['title']} vs {slower}, {length} tokens, {threads}: {reached:.2f}× of {goal:g}×. "
    if "stages" in one:
        stages = one["stages"][one["base"]][length]
        whole = sum(stages) or 1.0
        names = ("tokenizing", "encoding", "deciding")
        each = ", ".join(f"{name} {ms / whole:.0%}" for name, ms in zip(names, stages, strict=True))
        return place + f"Of arllm's time {each}. The largest is the next lever; both arms tokenize alike."
    shares = profiles.get("authored-int8", {}).get(length, {})
    products = sum(shares.get(op, 0.0) for op in INTEGER_PRODUCTS)
    if not products:
        return place + "There is no profile."
    others = [f"{op} {share:.0%}" for op, share in shares.items() if op not in INTEGER_PRODUCTS][:3]
    return place + (
        f"Of the authored graph's time {products:.0%} are integer products, which every int8 graph has; with all the "
        f"rest for nothing it would be {reached / products:.2f}×. Next lever: {', '.join(others)}."
    )


# --- published path ---------------------------------------------------------------------------------------------


def _published(found: Found) -> str:
    lengths, times = [str(length) for length in found["lengths"]], found["times"]
    rows, before = [], ""
    for name, step in found["steps"].items():
        cells = []
        for length in lengths:
            cell = _ms(median(times[name][length]))
            if before:
                cell += f" ({_times(times_faster(times[before][length], times[name][length]).median)})"
            cells.append(cell)
        rows.append([f"{name} (− {step})" if step else name, *cells])
        before = name
    first = next(iter(found["steps"]))
    whole = [_times(times_faster(times[first][length], times[before][length]).median) for length in lengths]
    rows.append(["**all steps together**", *(f"**{one}**" for one in whole)])
    return (
        "## The published path, its factor split\n\nTwo encoders in PyTorch fp32, every query padded to 2,048 "
        "tokens, then a Python loop over (query, candidate) pairs through NIR. Each row undoes one thing more; in "
        f"brackets, how many times as fast as the row above. {GEMMA}'s shape with {found['layers']} layers, random "
        f"weights, {_count(found['threads'], 'thread')}, 16 candidates, no tokenization; "
        f"{_count(found['rounds'], 'round')}.\n\n"
    ) + table(["ms by tokens", *lengths], rows)


# --- peers ------------------------------------------------------------------------------------------------------


def _peers(found: Found) -> str:
    characters = np.percentile(found["characters"], (50, 90, 100))
    text = (
        f"## Peers\n\nWhole decisions on the same {found['queries']} queries, a seeded sample of {found['source']}; "
        f"characters p50 / p90 / max: {' / '.join(f'{n:,.0f}' for n in characters)}. Every peer in a process and "
        "an environment of its own, with its defaults and as many threads as it takes by itself; encoders have "
        "random weights in the shape that the peer publishes, which changes what is chosen, not how long it takes. "
        "Rules and bags of words read no query with a network: they may be faster, and the last column of the "
        "second table says what is given up for it.\n\n"
    )
    base = found["times"].get(ARLLM)
    rows = []
    for peer in PEERS:
        for arm in peer.arms:
            label = arm if peer.name == "arllm" else f"{peer.name}: {arm}"
            if arm not in found["times"]:
                why = found["failed"].get(peer.name, "not run")
                rows.append([label, why, "", "", ""])
                continue
            times = found["times"][arm]
            ratio = ["", ""]
            if base and arm != ARLLM:
                ratio = [_spread(times_faster(times, base)), _times(sum(times) / sum(base))]
            rows.append([label, *(_ms(float(v)) for v in np.percentile(times, (50, 95))), *ratio])
    text += table(["router", "p50 ms", "p95 ms", "times as long as nano, per query", "all queries together"], rows)
    head = ["router", "encoder", "decides", "learned from", "candidates", "does not know"]
    about = [[p.name, p.encoder, p.decides, p.learned_from, p.candidates, p.lacks] for p in PEERS]
    pinned = [f"`{p.name}`: {', '.join(p.requirements)}" for p in PEERS if p.requirements]
    return f"{text}\n\n{table(head, about)}\n\nEnvironments: {'; '.join(pinned)}."


def _again() -> str:
    return (
        "## Again\n\n```\nmake bench                        # everything, graphs and environments included\n"
        "make bench ARLLM_BENCH_CLOCK=cpu  # one thread's processor time, for a machine that is not quiet\n```\n\n"
        "Graphs and environments are kept in `~/.cache/arllm/benchmarks` (or `ARLLM_BENCH_CACHE`), the JSON files in "
        "`out/bench`. `arllm bench BUNDLE` measures one bundle: percentiles, callers, batches, cold start, memory."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="RESULTS.md from the comparisons' JSON files.")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    text = render({name: read(given.folder / f"{name}.json") for name in FILES})
    given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
