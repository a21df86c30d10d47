"""The ways that are timed against each other compute the same, and the figures add up."""

import json
from dataclasses import replace

import pytest
import torch

from hidream import cli
from hidream.bench import timing
from hidream.bench.cases import TEXT_TO_IMAGE, WITH_REFERENCES, Case, branches_of
from hidream.bench.peers import WAYS
from hidream.models.o1.config import O1_TINY


@pytest.mark.parametrize("num_references", [0, 1, 3])
@torch.inference_mode()
def test_all_ways_agree(tiny_model, tokenizer, num_references):
    case = Case(side=3, num_text=30, num_references=num_references)
    branches = branches_of(case, tokenizer, O1_TINY)
    shape = (1, branches[0].num_target, O1_TINY.patch_dim)
    x_t = torch.randn(shape, generator=torch.Generator().manual_seed(1)).expand(2, -1, -1)
    clean = {}
    for name, way in WAYS.items():
        one = way(tiny_model)
        one.begin(branches)
        clean[name] = one.step(x_t, torch.tensor(0.6))
    largest = clean["ours"].abs().max()
    assert (clean["ours"][0] - clean["ours"][1]).abs().max() > 1e-3 * largest  # two branches
    for name in ("plain", "two_pass"):
        assert (clean[name] - clean["ours"]).abs().max() <= 1e-5 * largest, name


@pytest.mark.parametrize("case", [*TEXT_TO_IMAGE[:2], WITH_REFERENCES[0]])
def test_a_case_has_the_length_it_names(case, tokenizer):
    conditional, unconditional = branches_of(case, tokenizer, O1_TINY)
    words = [len(t.input_ids) - int(t.image_slots.sum()) for t in (conditional, unconditional)]
    assert words[0] == case.num_text > words[1]
    assert conditional.num_target == case.side**2
    assert bool(len(conditional.references)) == bool(case.num_references)


def test_figures_of_a_run(tiny_model, tokenizer):
    cases = (Case(side=2, num_text=30), Case(side=2, num_text=30, num_references=1))
    said = []
    result = timing.run(
        tiny_model, tokenizer, num_steps=3, rounds=2, cases=cases, on_progress=said.append
    )
    assert [row["case"] for row in result["cases"]] == [case.name for case in cases]
    assert set(result["ours_faster"]) == {"text", "edit"}
    for row in result["cases"]:
        for name in WAYS:
            assert row["step_ms"][name] > 0
            assert row["picture_ms"][name] >= row["begin_ms"][name]
        assert row["max_difference"]["plain"] < 1e-4
        assert 1 < row["arithmetic"]["plain"] < row["arithmetic"]["two_pass"]
    assert len(said) == 2
    assert timing.machine()["cpu"]


def test_means_are_geometric_and_by_task(monkeypatch):
    leads = iter([2.0, 8.0, 3.0])

    def timed(model, tokenizer, case, **options):
        lead = next(leads)
        leads_of = {"plain": lead, "two_pass": 1.0}
        return {"case": case.name, "ours_faster": leads_of, "arithmetic": leads_of}

    monkeypatch.setattr(timing, "time_case", timed)
    cases = [Case(side=2, num_text=30), Case(side=3, num_text=30)]
    cases.append(replace(cases[0], num_references=10))
    result = timing.run(None, None, cases=cases)
    assert result["ours_faster"] == result["arithmetic"]
    assert result["ours_faster"] == {
        "text": {"plain": 4.0, "two_pass": 1.0},
        "subject": {"plain": 3.0, "two_pass": 1.0},
    }


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--steps", "0"], 2, "--steps 0 is out of range"),
        (["--rounds", "x"], 2, "--rounds"),
        (["--memory", "low"], 2, "--memory low"),
        (["-o", "/no/such/folder/x.json"], 3, "is not a folder"),
    ],
)
def test_refusals(flags, code, words, capsys):
    assert cli.main(["bench", *flags]) == code
    assert words in capsys.readouterr().err


def test_the_command_keeps_its_figures(tmp_path, monkeypatch, capsys, tiny_folder):
    monkeypatch.setattr(timing, "cold_start", lambda model, device: {"import": 1.0})
    out = tmp_path / "bench.json"
    arguments = ["-m", str(tiny_folder), "--quick", "--rounds", "1", "--steps", "2"]
    assert cli.main(["bench", *arguments, "-o", str(out)]) == 0
    kept = json.loads(out.read_text())
    assert [row["case"] for row in kept["cases"]] == [case.name for case in TEXT_TO_IMAGE[:2]]
    assert "geometric means" in capsys.readouterr().out
