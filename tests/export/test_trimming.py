"""Tests of export/trimming.py: the network on fewer rows, what a size and a corpus choose, what is told of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray

from arllm.cli import main
from arllm.export import graphs, trimming
from arllm.export.authored import export_authored
from arllm.export.trimming import read_corpus, told_losses, trim, trim_encoder
from arllm.runtime.doctor import examine
from arllm.runtime.errors import ExportError, OutcomesError, ParityError
from arllm.train.encoder import QueryEncoder, pad_batch
from arllm.train.outcomes import read_outcomes
from arllm.train.rundir import Run, read_run

Ids = NDArray[np.int64]


def quiet(message: str) -> None:
    pass


@pytest.fixture(scope="module")
def run(tiny_run: Path) -> Run:
    return read_run(tiny_run)


@pytest.fixture(scope="module")
def small(run: Run) -> Run:
    return trim(run, "700", 2000, quiet)


@pytest.fixture
def corpus(tmp_path: Path) -> Callable[..., str]:
    def write(*queries: str, name: str = "corpus.jsonl", **fields: str) -> str:
        rows = [json.dumps({"query": query, **fields}) + "\n" for query in queries]
        (tmp_path / name).write_text("".join(rows), encoding="utf-8")
        return str(tmp_path / name)

    return write


def told(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = run.source["vocabulary"]
    return found


def forward(encoder: QueryEncoder, rows: list[Ids]) -> tuple[Any, Any]:
    ids, mask = pad_batch(rows, encoder.spec.tokens.pad_id)
    with torch.no_grad():
        return encoder(ids, mask).query_vector.numpy(), encoder.familiarity(ids, mask).numpy()


# --- the network --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(traced: Any) -> tuple[QueryEncoder, QueryEncoder, Ids]:
    """A whole encoder of 300 tokens with unlike rows, the trimmed one, and its former ids."""
    whole = traced("nano").encoder
    spec = dataclasses.replace(whole.spec.tokens, prefix_ids=(40, 3), suffix_ids=(41,), pad_id=9)
    changed = QueryEncoder(dataclasses.replace(whole.spec, tokens=spec)).eval()
    changed.load_state_dict(whole.state_dict())
    changed.token_weight.copy_(torch.rand(300) + 0.5)
    old = np.sort(np.random.default_rng(0).permutation(np.arange(50, 300))[:100])
    old = np.concatenate([[3, 9, 40, 41], old]).astype(np.int64)
    return changed, trim_encoder(changed, old), old


def test_the_trimmed_network_says_the_same_on_renumbered_tokens(pair: tuple[QueryEncoder, QueryEncoder, Ids]) -> None:
    whole, trimmed, old = pair
    rows = [np.random.default_rng(i).integers(0, len(old), 5 + 7 * i) for i in range(6)]
    (want, want_familiar), (have, familiar) = forward(whole, [old[row] for row in rows]), forward(trimmed, rows)
    np.testing.assert_allclose(have, want, atol=1e-6)
    np.testing.assert_allclose(familiar, want_familiar, atol=1e-6)
    assert 0.0 < familiar.min() < familiar.max() < 1.0
    trimmed.original_ids, kept = None, trimmed.original_ids
    assert np.abs(forward(trimmed, rows)[1] - want_familiar).max() > 0.01  # pairs go by their former ids
    trimmed.original_ids = kept


def test_special_tokens_are_renumbered(pair: tuple[QueryEncoder, QueryEncoder, Ids]) -> None:
    spec = pair[1].spec
    assert (spec.tokens.prefix_ids, spec.tokens.suffix_ids, spec.tokens.pad_id) == ((2, 0), (3,), 1)
    assert (spec.backbone.vocab_size, spec.tokens.max_tokens) == (104, 512)


def test_trimming_twice_still_knows_the_first_ids(pair: tuple[QueryEncoder, QueryEncoder, Ids]) -> None:
    _, once, old = pair
    twice = trim_encoder(once, np.array([0, 1, 2, 3, 50, 70]))
    assert twice.original_ids is not None
    assert twice.original_ids.tolist() == old[[0, 1, 2, 3, 50, 70]].tolist()


@pytest.mark.parametrize("export", [graphs.export_encoder, export_authored])
def test_graphs_of_it(export: Any, pair: tuple[QueryEncoder, QueryEncoder, Ids], tmp_path: Path) -> None:
    trimmed = pair[1]
    path = export(trimmed, tmp_path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    rows = [np.random.default_rng(i).integers(0, 104, 4 + 9 * i) for i in range(4)]
    ids, mask = (tensor.numpy() for tensor in pad_batch(rows, 1))
    vector, familiarity = session.run(["query_vector", "familiarity"], {"input_ids": ids, "attention_mask": mask})
    want, familiar = forward(trimmed, rows)
    np.testing.assert_allclose(vector, want, atol=1e-5)
    np.testing.assert_allclose(familiarity, familiar, atol=1e-5)


# --- by size ------------------------------------------------------------------------------------------------


def test_a_size_is_kept_to_and_told(run: Run, small: Run) -> None:
    assert small.tokenizer.get_vocab_size() == small.encoder.spec.backbone.vocab_size == 700
    vocabulary = told(small)
    size = run.tokenizer.get_vocab_size()
    assert (vocabulary["from"], vocabulary["to"], vocabulary["by"]) == (size, 700, {"size": 700})
    assert "vocabulary" not in run.source


def test_the_losses_are_those_of_the_held_out_queries(run: Run, small: Run) -> None:
    losses = told(small)["losses"]
    whole, trimmed = run.text_tokenizer(), small.text_tokenizer()
    kept = small.tokenizer.get_vocab()
    pieces = run.tokenizer.id_to_token
    covered = [all(pieces(i) in kept for i in whole.encode(query)[0].tolist()) for query in run.heldout.queries]
    assert losses["queries"] == len(run.heldout.queries)
    assert losses["agreement"] == pytest.approx(np.mean(covered))
    assert 0.0 < losses["agreement"] < 1.0
    assert losses["where_ids_differ"]["queries"] == len(covered) - sum(covered)
    lengths = []
    for tokenizer in (trimmed, whole):
        encoded = [tokenizer.encode(query) for query in run.heldout.queries]
        lengths.append(sum(len(ids) + cut.tokens_dropped for ids, cut in encoded))
    assert losses["tokens"] == lengths
    assert losses["byte_tokens"] == [0, 0]
    share = 1.0 - losses["agreement"]
    assert losses["mean_regret"] == pytest.approx(share * losses["where_ids_differ"]["mean_regret"])
    assert losses["choice_agreement"] == pytest.approx(1.0 - share * (1.0 - losses["where_ids_differ"]["agreement"]))
    assert told_losses(losses).startswith(f"ids agree on {losses['agreement']:.1%} of {losses['queries']} held-out")


def test_fewer_queries_are_measured_where_fewer_are_asked_for(run: Run) -> None:
    assert told(trim(run, "700", 7, quiet))["losses"]["queries"] == 7


def test_a_smaller_vocabulary_loses_more(run: Run, small: Run) -> None:
    losses, worse = told(small)["losses"], told(trim(run, "300", 2000, quiet))["losses"]
    assert worse["agreement"] < losses["agreement"]
    assert worse["tokens"][0] > losses["tokens"][0] > losses["tokens"][1]


def test_pieces_of_the_training_queries_come_first(run: Run) -> None:
    """By their idf weights, which are those of a pretrained backbone: the rarest merge, made frequent, is kept."""
    last = list(trimming.Vocabulary(run.tokenizer, 10_000).built())[-1]
    encoder = QueryEncoder(run.encoder.spec)
    encoder.load_state_dict(run.encoder.state_dict())
    encoder.token_weight.fill_(8.0)[run.tokenizer.token_to_id(last)] = 1.0
    options = dataclasses.replace(run.options, backbone="gemma3-270m")
    pretrained = dataclasses.replace(run, encoder=encoder.eval(), options=options)
    assert last in trim(pretrained, "300", 10, quiet).tokenizer.get_vocab()
    assert last not in trim(run, "300", 10, quiet).tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("keep", "reason"),
    [("100000", r"of \d+ pieces can't be trimmed to 100000: give fewer"), ("20", "20 pieces is too small: 259")],
)
def test_sizes_that_make_no_sense(run: Run, keep: str, reason: str) -> None:
    with pytest.raises(ExportError, match=reason):
        trim(run, keep, 10, quiet)


def test_networks_that_differ_where_ids_agree_are_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(encoder: QueryEncoder, old: Ids) -> QueryEncoder:
        trimmed = trim_encoder(encoder, old)
        trimmed.token_weight.copy_(encoder.token_weight[: len(old)].flip(0))
        return trimmed

    monkeypatch.setattr(trimming, "trim_encoder", broken)
    with pytest.raises(ParityError, match=r"query vector differs by .* where token ids agree"):
        trim(run, "700", 2000, quiet)


# --- by corpus ----------------------------------------------------------------------------------------------


def test_queries_of_the_corpus_stay_as_they_are(run: Run, corpus: Callable[..., str]) -> None:
    queries = run.heldout.queries[:30]
    path = corpus(*queries)
    trimmed = trim(run, path, 2000, quiet)
    assert trimmed.tokenizer.get_vocab_size() < run.tokenizer.get_vocab_size()
    rows = [[of.text_tokenizer().encode(query)[0] for query in queries] for of in (run, trimmed)]
    names = [
        [of.tokenizer.id_to_token(i) for row in own for i in row]
        for of, own in zip((run, trimmed), rows, strict=True)
    ]
    assert names[0] == names[1]
    for want, have in zip(forward(run.encoder, rows[0]), forward(trimmed.encoder, rows[1]), strict=True):
        np.testing.assert_allclose(have, want, atol=1e-5)
    by = told(trimmed)["by"]
    assert (by["queries"], by["corpus"][0]["path"], len(by["corpus"][0]["sha256"])) == (30, path, 64)
    assert told(trimmed)["losses"]["queries"] == len([q for q in run.heldout.queries if q not in queries])


def test_nothing_is_measured_on_what_was_chosen_by(run: Run, corpus: Callable[..., str]) -> None:
    losses = told(trim(run, corpus(*run.heldout.queries), 2000, quiet))["losses"]
    assert losses["queries"] == 0
    assert [losses[key] for key in ("agreement", "mean_regret", "choice_agreement")] == [None] * 3
    assert told_losses(losses) == "what is lost was not measured: every held-out query is in the corpus"


def test_a_text_file_is_one_text(run: Run, tmp_path: Path) -> None:
    (tmp_path / "manual.txt").write_text("not ( True )\n\nWhat is 12 + 30?\n" * 40)
    found = read_corpus(tmp_path / "manual.txt", run.text_tokenizer())
    assert len(found.ids) == 1
    assert len(found.ids[0]) > run.encoder.spec.tokens.max_tokens  # whole: a query would be cut
    assert found.sources[0].bytes == (tmp_path / "manual.txt").stat().st_size


def test_held_out_splits_choose_nothing(run: Run, corpus: Callable[..., str], outcomes_folder: Path) -> None:
    with pytest.raises(OutcomesError, match="no query of the wanted splits; the file has: test"):
        read_corpus(corpus("What is 1 + 1?", split="test"), run.text_tokenizer())
    known = [split in ("", "train") for split in read_outcomes(outcomes_folder).splits]
    assert len(read_corpus(outcomes_folder, run.text_tokenizer()).ids) == sum(known)


def test_corpora_that_can_not_be_read(run: Run, tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text(" \n")
    for name, reason in (("blank.txt", "holds no text"), ("none.jsonl", "no such file"), ("x.docx", "unknown form")):
        with pytest.raises(OutcomesError, match=reason):
            trim(run, str(tmp_path / name), 10, quiet)


# --- the bundle ---------------------------------------------------------------------------------------------


def test_a_bundle_of_a_trimmed_run(tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    command = ["export", str(tiny_run), "--out", str(out), "--variant", "cpu-fp32", "--verify-queries", "20"]
    result = CliRunner().invoke(main, [*command, "--trim-vocabulary", "700"])
    assert result.exit_code == 0, result.output
    manifest = json.loads((out / "manifest.json").read_text())
    vocabulary = manifest["source"]["vocabulary"]
    assert (vocabulary["to"], vocabulary["losses"]["queries"]) == (700, 20)
    assert json.loads((out / "parity.json").read_text())["vocabulary"] == vocabulary
    assert len(json.loads((out / "tokenizer.json").read_text())["model"]["vocab"]) == 700
    assert f"- Vocabulary: 700 of {vocabulary['from']} pieces; ids agree on" in (out / "README.md").read_text()
    assert examine(str(out))[1]  # conformance
    shown = CliRunner().invoke(main, ["inspect", str(out)]).output
    assert f"vocabulary    700 of {vocabulary['from']} pieces; ids agree on" in shown


def test_a_checkpoint_has_no_vocabulary_to_trim() -> None:
    command = ["export", "--nir-checkpoint", __file__, "--domains", "a", "--pool", __file__, "--out", "x"]
    result = CliRunner().invoke(main, [*command, "--trim-vocabulary", "700"])
    assert result.exit_code == 2
    assert "--trim-vocabulary goes with RUN" in result.output
