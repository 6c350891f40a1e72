"""Accepted findings are found again: after edits, after renames, and never by mistake."""

from __future__ import annotations

import dataclasses
import datetime

import pytest
from sample_report import deep_model, hostile_model, layer, sample_report

from initaudit.baseline import Baseline, read_baseline
from initaudit.report.report import ModelReport, Report

DAY = datetime.date(2026, 1, 2)


def report_on(*tensors: str, source: str = "net.onnx", code: str = "IA301") -> Report:
    finding = deep_model().findings[0]
    findings = tuple(dataclasses.replace(finding, tensor=tensor, site=tensor, code=code) for tensor in tensors)
    return Report((ModelReport(source, "onnx", layers=(layer("w"),), findings=findings),), "0")


def new(baseline: Baseline, report: Report) -> list[str]:
    return [finding.tensor for model in baseline.without_accepted(report).models for finding in model.findings]


def test_what_is_written_is_read_and_accepted(tmp_path):
    baseline = Baseline().accept(sample_report(), "because", DAY)
    baseline.write(tmp_path / "known.json")
    again = read_baseline(tmp_path / "known.json")
    assert {entry.fingerprint for entry in again.entries} == {entry.fingerprint for entry in baseline.entries}
    assert len(again.entries) == sum(len(model.findings) for model in sample_report().models)
    assert new(again, sample_report()) == []
    assert again.vanished(sample_report()) == ()
    assert {entry.date for entry in again.entries} == {"2026-01-02"}
    first = (tmp_path / "known.json").read_bytes()
    again.write(tmp_path / "known.json")
    assert (tmp_path / "known.json").read_bytes() == first


def test_wording_numbers_and_severity_do_not_matter():
    baseline = Baseline().accept(report_on("a", "b"), "", DAY)
    report = report_on("b", "a")
    edited = tuple(dataclasses.replace(f, message="x", severity="info", measured=3.0) for f in report.models[0].findings)
    assert new(baseline, Report((dataclasses.replace(report.models[0], findings=edited),), "0")) == []


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("fc1.weight", "fc2.weight"), ("module.fc1.weight", "module.fc2.weight")),
        (("model.fc1.weight", "model.fc2.weight"), ("fc1.weight", "fc2.weight")),
        (("fc1.weight",), ("base/model.fc1.weight",)),
    ],
)
def test_a_prefix_gained_or_lost_does_not_matter(before, after):
    baseline = Baseline().accept(report_on(*before), "", DAY)
    assert new(baseline, report_on(*after)) == []
    assert baseline.vanished(report_on(*after)) == ()
    kept = baseline.accept(report_on(*after), "later", datetime.date(2026, 5, 5))
    assert {entry.date for entry in kept.entries} == {"2026-01-02"}
    assert {entry.tensor for entry in kept.entries} == set(after)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (("fc1.weight",), ("fc2.weight",), ["fc2.weight"]),
        (("weight",), ("myweight",), ["myweight"]),
        (("a.w", "b.w"), ("m.a.w", "n.b.w"), ["n.b.w"]),
        (("a.w",), ("a.w", "m.a.w"), ["m.a.w"]),
        (("a.w",), ("m.a.w", "m.m.a.w"), ["m.m.a.w"]),
    ],
)
def test_other_names_are_new_findings(before, after, expected):
    assert new(Baseline().accept(report_on(*before), "", DAY), report_on(*after)) == expected


def test_another_rule_or_another_model_is_new():
    baseline = Baseline().accept(report_on("a"), "", DAY)
    assert new(baseline, report_on("a", code="IA302")) == ["a"]
    assert new(baseline, report_on("a", source="other.onnx")) == ["a"]


def test_entries_of_models_that_were_not_audited_stay():
    baseline = Baseline().accept(report_on("a"), "", DAY).accept(report_on("b", source="other.onnx"), "", DAY)
    assert [entry.tensor for entry in baseline.vanished(report_on())] == ["a"]
    assert [entry.tensor for entry in baseline.without(baseline.vanished(report_on())).entries] == ["b"]


def test_the_same_finding_twice_is_accepted_twice_and_no_oftener():
    model = hostile_model()
    once = Report((dataclasses.replace(model, findings=model.findings[:1]),), "0")
    twice = Report((dataclasses.replace(model, findings=model.findings[:1] * 2),), "0")
    assert new(Baseline().accept(once, "", DAY), twice) == [model.findings[0].tensor]
    assert new(Baseline().accept(twice, "", DAY), twice) == []
