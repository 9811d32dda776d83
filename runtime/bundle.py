"""The bundle: manifest dataclasses, and reading and verifying a bundle folder. The format: artifacts/README.md.

Knows nothing about sessions or routing. Nothing is downloaded, exported or repaired here.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from arllm.runtime.errors import BundleIntegrityError, BundleNotFoundError, BundleSchemaError, PoolError
from arllm.runtime.pool import Pool, read_pool_json
from arllm.runtime.tokens import TokenSpec

SCHEMA_VERSION = 3  # 2 added calibration, domain shares and familiarity, 3 the centre of HDP and router.onnx
MANIFEST = "manifest.json"
POLICIES = ("nir", "hdp", "hdp-paper")
# What the runtime feeds each graph and asks of it; a graph may have further outputs.
GRAPH_IO = {
    "encoder": ({"input_ids", "attention_mask"}, {"query_vector"}),
    "nir": ({"query_vectors", "model_vectors"}, {"quality"}),
    "router": (
        {
            *("input_ids", "attention_mask", "model_vectors", "offsets"),
            *("costs", "cost_bounds", "candidate_mask", "beta"),
        },
        {"quality", "utility", "choice", "familiarity"},
    ),
}
DTYPES = ("int64", "float32", "float64", "bool")
SHIPPED = Path(__file__).resolve().parent.parent / "artifacts"  # beside this package, installed or editable


@dataclass(frozen=True)
class Tensor:
    """An input or output of a graph: symbolic dims are strings."""

    name: str
    dtype: str
    dims: tuple[str | int, ...]


@dataclass(frozen=True)
class Graph:
    kind: str  # a key of GRAPH_IO
    path: str  # relative to the bundle
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Variant:
    """One precision and provider of the bundle.

    ``encoder`` is None in a NIR-only bundle; ``router``, both and the decision in one graph for other hosts, is None
    in older bundles too.
    """

    name: str
    provider: str
    precision: str
    instruction_set: str  # "any", or what its integers need to be right
    graph: str  # how the encoder's graph came to be: "traced", or "authored" from the weights
    encoder: Graph | None
    nir: Graph | None
    parity: Mapping[str, Any]  # summary of parity.json
    router: Graph | None = None
    verified_on: tuple[str, ...] | None = None  # cards that its figures come from; None = the exporting host's CPU

    @property
    def graphs(self) -> tuple[Graph, ...]:
        return tuple(graph for graph in (self.encoder, self.nir, self.router) if graph is not None)

    @property
    def batch_invariant(self) -> bool:
        """Whether a query got the same bits in a batch of its length and alone, where the variant was measured."""
        return self.parity.get("batch_max_difference") == 0.0


@dataclass(frozen=True)
class Manifest:
    name: str
    producer: Mapping[str, str]
    source: Mapping[str, Any]
    domains: tuple[str, ...]
    embedding_width: int
    domain_shares: tuple[float, ...] | None  # of the training queries, sum 1; None where nothing was trained
    mean_difficulty: float | None  # of the training queries, as their outcomes have it
    tokens: TokenSpec | None
    default_policy: str
    policies: Mapping[str, Mapping[str, Any]]
    cost_minimum: float
    cost_maximum: float
    variants: dict[str, Variant]  # in order of preference for "auto"
    files: Mapping[str, tuple[str, int]]  # path → (sha256, bytes)
    raw: Mapping[str, Any] = field(repr=False)

    @property
    def query_width(self) -> int:
        return len(self.domains) + 1 + self.embedding_width


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files are the manifest's, and (where verified) whose bytes are too."""

    path: Path
    manifest: Manifest
    pool: Pool
    digest: str  # sha256 of manifest.json: it covers every other file


def find_bundle(name: str | os.PathLike[str]) -> Path:
    """The folder of a bundle: a path, or the name of one that ships with arllm (``nano``).

    Raises:
        BundleNotFoundError: neither exists.
    """
    path = Path(name)
    if (path / MANIFEST).is_file():
        return path
    shipped = SHIPPED / path.name
    if str(name) == path.name and not path.exists() and (shipped / MANIFEST).is_file():
        return shipped
    have = sorted(p.parent.name for p in SHIPPED.glob(f"[!.]*/{MANIFEST}"))
    raise BundleNotFoundError(
        f"{path}: no bundle here (no {MANIFEST}). Make one with `arllm export RUN --out BUNDLE`"
        + (f", or name one that ships: {', '.join(have)}" if have else "")
    )


def open_bundle(name: str | os.PathLike[str], verify: bool = True) -> Bundle:
    """Read and check a bundle.

    The set of files is always compared with the manifest's; ``verify`` also compares every sha256.

    Raises:
        BundleNotFoundError, BundleIntegrityError, BundleSchemaError: each names the file at fault.
    """
    root = find_bundle(name)
    raw_bytes = (root / MANIFEST).read_bytes()
    manifest = parse_manifest(raw_bytes, str(root / MANIFEST))
    check_files(root, manifest, verify=verify)
    try:
        pool = read_pool_json(root / "pool.json")
    except PoolError as error:
        raise BundleSchemaError(str(error)) from None
    try:
        vectors = pool.vectors()
    except PoolError as error:
        raise BundleSchemaError(f"{root / 'pool.json'}: {error}") from None
    if vectors.shape[1] != len(manifest.domains):
        raise BundleSchemaError(
            f"{root / 'pool.json'}: model vectors have {vectors.shape[1]} entries, "
            f"the manifest names {len(manifest.domains)} domains"
        )
    bounds = (pool.candidates[0].cost, pool.candidates[-1].cost)
    if bounds != (manifest.cost_minimum, manifest.cost_maximum):
        raise BundleSchemaError(
            f"{root / MANIFEST}: cost: {manifest.cost_minimum} to {manifest.cost_maximum}, the pool's costs go from "
            f"{bounds[0]} to {bounds[1]}"
        )
    return Bundle(root, manifest, pool, hashlib.sha256(raw_bytes).hexdigest())


def check_files(root: Path, manifest: Manifest, *, verify: bool) -> None:
    """Compare the folder with ``manifest.files``: nothing missing, nothing extra, no links, sizes and hashes."""
    found: set[str] = set()
    for folder, subfolders, names in os.walk(root):
        for entry in (*subfolders, *names):
            full = Path(folder) / entry
            mode = full.lstat().st_mode
            if stat.S_ISLNK(mode) or not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
                raise BundleIntegrityError(f"{full}: a bundle holds plain files only, no links or devices")
        found.update((Path(folder) / entry).relative_to(root).as_posix() for entry in names)
    found.discard(MANIFEST)
    for path in sorted(found - set(manifest.files)):
        raise BundleIntegrityError(f"{root / path}: not listed in {MANIFEST}; a bundle is immutable")
    for path, (sha256, size) in manifest.files.items():
        full = root / path
        if path not in found:
            raise BundleIntegrityError(f"{full}: listed in {MANIFEST}, but missing")
        actual = full.stat().st_size
        if actual != size:
            raise BundleIntegrityError(f"{full}: {actual} bytes, {MANIFEST} says {size}")
        if verify and sha256_of(full) != sha256:
            raise BundleIntegrityError(f"{full}: its sha256 differs from the manifest's: the file was changed")


def list_files(root: Path) -> dict[str, dict[str, Any]]:
    """What the manifest says of a folder's files, itself left out: path → sha256 and bytes."""
    paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    return {
        path: {"sha256": sha256_of(root / path), "bytes": (root / path).stat().st_size}
        for path in paths
        if path != MANIFEST
    }


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class _Reader:
    """Typed access to parsed JSON; every failure names the manifest and the field."""

    def __init__(self, data: Any, where: str, field_path: str = "") -> None:
        self.where, self.path = where, field_path
        if not isinstance(data, dict):
            raise self.error("", f"expected an object, found {type(data).__name__}")
        self.data: dict[str, Any] = data

    def error(self, key: str, message: str) -> BundleSchemaError:
        name = f"{self.path}.{key}".strip(".") or "top level"
        return BundleSchemaError(f"{self.where}: {name}: {message}")

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
        value = self.data.get(key, default)
        if value is ...:
            raise self.error(key, "missing")
        if (isinstance(value, bool) and kind is not bool) or not isinstance(value, kind):
            if value is None and default is None:
                return None
            raise self.error(key, f"unexpected {type(value).__name__}")
        return value

    def child(self, key: str) -> _Reader:
        return _Reader(self.get(key, dict), self.where, f"{self.path}.{key}".strip("."))


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Parse manifest.json.

    Raises:
        BundleSchemaError: names the field; a newer schema version says to upgrade arllm.
    """
    try:
        top = _Reader(json.loads(data), where)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError included
        raise BundleSchemaError(f"{where}: not valid JSON: {error}") from None
    version = top.get("schema_version", int)
    if version > SCHEMA_VERSION:
        raise BundleSchemaError(
            f"{where}: schema version {version} is newer than {SCHEMA_VERSION}: pip install --upgrade arllm"
        )
    if version < 1:
        raise BundleSchemaError(f"{where}: schema_version: {version} does not exist")
    query = top.child("query")
    domains = tuple(query.get("domains", list))
    if not domains or not all(isinstance(d, str) for d in domains) or len(set(domains)) != len(domains):
        raise query.error("domains", "expected distinct names, at least one")
    embedding_width = query.get("embedding_width", int)
    if embedding_width < 0:
        raise query.error("embedding_width", "must not be negative")
    shares = query.get("domain_shares", list, None)
    if shares is not None and (
        len(shares) != len(domains)
        or not all(isinstance(v, (int, float)) and not isinstance(v, bool) and 0 <= v <= 1 for v in shares)
    ):
        raise query.error("domain_shares", f"expected {len(domains)} numbers in [0, 1]")
    mean_difficulty = query.get("mean_difficulty", (int, float), None)
    if mean_difficulty is not None and not 0 <= mean_difficulty <= 1:
        raise query.error("mean_difficulty", f"must lie in [0, 1], not {mean_difficulty}")
    tokens = top.get("tokens", dict, None)
    cost = top.child("cost")
    minimum, maximum = cost.get("minimum", (int, float)), cost.get("maximum", (int, float))
    if not 0 <= minimum <= maximum <= sys.float_info.max:
        raise cost.error("", f"expected finite bounds, the minimum first, not {minimum} and {maximum}")
    policies = top.get("policies", dict)
    for policy, parameters in policies.items():
        if policy not in POLICIES:
            raise top.error("policies", f"unknown policy {policy!r}")
        if not isinstance(parameters, dict):
            raise top.error(f"policies.{policy}", "expected an object")
    default_policy = top.get("default_policy", str)
    if default_policy not in policies:
        raise top.error("default_policy", f"{default_policy!r} is not among the policies {sorted(policies)}")
    variants = {}
    for i, entry in enumerate(top.get("variants", list)):
        variant = _variant(_Reader(entry, where, f"variants[{i}]"))
        if variant.name in variants:
            raise top.error(f"variants[{i}].name", f"{variant.name!r} stands there twice")
        variants[variant.name] = variant
    if not variants:
        raise top.error("variants", "the bundle has none")
    manifest = Manifest(
        name=top.get("name", str),
        producer=top.get("producer", dict),
        source=top.get("source", dict),
        domains=domains,
        embedding_width=embedding_width,
        domain_shares=None if shares is None else tuple(float(v) for v in shares),
        mean_difficulty=None if mean_difficulty is None else float(mean_difficulty),
        tokens=None if tokens is None else _tokens(tokens, where),
        default_policy=default_policy,
        policies=policies,
        cost_minimum=float(minimum),
        cost_maximum=float(maximum),
        variants=variants,
        files=_files(top.child("files")),
        raw=top.data,
    )
    _check_references(manifest, top)
    return manifest


def _tokens(data: dict[str, Any], where: str) -> TokenSpec:
    try:
        return TokenSpec.from_json(data)
    except BundleSchemaError as error:
        raise BundleSchemaError(f"{where}: {error}") from None


def _files(files: _Reader) -> dict[str, tuple[str, int]]:
    listed = {}
    for path in files.data:
        pure = PurePosixPath(path)
        if pure.is_absolute() or ".." in pure.parts or "\\" in path or ":" in path or str(pure) != path:
            raise BundleIntegrityError(f"{files.where}: files: {path!r} does not stay inside the bundle")
        entry = files.child(path)
        listed[path] = (entry.get("sha256", str), entry.get("bytes", int))
    return listed


def _check_references(manifest: Manifest, top: _Reader) -> None:
    graphs = [graph for variant in manifest.variants.values() for graph in variant.graphs]
    needed = {"pool.json", *(graph.path for graph in graphs)}
    if manifest.tokens is not None:
        needed.add("tokenizer.json")
    for path in sorted(needed - set(manifest.files)):
        raise top.error("files", f"{path} is used, but not listed")
    for variant in manifest.variants.values():
        if (variant.encoder is None) != (manifest.tokens is None):
            raise top.error("tokens", f"variant {variant.name} and tokens disagree about having an encoder")
        if "nir" in manifest.policies and variant.nir is None:
            raise top.error("variants", f"policy nir is declared, but variant {variant.name} has no nir graph")
        if variant.router is not None and (variant.encoder is None or manifest.default_policy != "nir"):
            raise top.error(
                "variants", f"variant {variant.name} has a router graph, but no encoder, or another policy"
            )


def _variant(entry: _Reader) -> Variant:
    graphs = entry.child("graphs")
    unknown = set(graphs.data) - set(GRAPH_IO)
    if unknown:
        raise graphs.error(sorted(unknown)[0], "unknown graph")
    cards = entry.get("verified_on", list, None)
    if cards is not None and not all(isinstance(card, str) for card in cards):
        raise entry.error("verified_on", "expected names of devices")
    return Variant(
        name=entry.get("name", str),
        provider=entry.get("provider", str),
        precision=entry.get("precision", str),
        instruction_set=entry.get("instruction_set", str),
        graph=entry.get("graph", str, "traced"),  # before the field existed there was no other way
        encoder=_graph(graphs.child("encoder"), "encoder") if "encoder" in graphs.data else None,
        nir=_graph(graphs.child("nir"), "nir") if "nir" in graphs.data else None,
        parity=entry.get("parity", dict),
        router=_graph(graphs.child("router"), "router") if "router" in graphs.data else None,
        verified_on=None if cards is None else tuple(cards),
    )


def _graph(graph: _Reader, kind: str) -> Graph:
    return Graph(kind, graph.get("path", str), _tensors(graph, "inputs"), _tensors(graph, "outputs"))


def _tensors(graph: _Reader, key: str) -> tuple[Tensor, ...]:
    tensors = []
    for i, item in enumerate(graph.get(key, list)):
        entry = _Reader(item, graph.where, f"{graph.path}.{key}[{i}]")
        dtype = entry.get("dtype", str)
        if dtype not in DTYPES:
            raise entry.error("dtype", f"{dtype!r} is none of {', '.join(DTYPES)}")
        dims = tuple(entry.get("dims", list))
        if not all(isinstance(dim, (int, str)) and not isinstance(dim, bool) for dim in dims):
            raise entry.error("dims", f"expected names and whole numbers, not {list(dims)}")
        tensors.append(Tensor(entry.get("name", str), dtype, dims))
    return tuple(tensors)
