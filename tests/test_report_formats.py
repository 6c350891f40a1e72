"""Every format is fed the same sample: it is safe to print, it fits, and readers of that format accept it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

import jsonschema
import pytest
from sample_report import HOSTILE, deep_model, healthy_model, hostile_model, layer, sample_report

from initaudit.errors import UsageError
from initaudit.report import Style, format_named, format_of, formats, register
from initaudit.report.as_markdown import LIMIT
from initaudit.report.report import ModelReport, Report
from initaudit.report.style import escape, number, shorten
from initaudit.report.summary import fingerprints
from initaudit.rules import all_rules

DOCS = Path(__file__).parent.parent / "docs"


def official_sarif_schema() -> Path | None:
    """OASIS's schema file: too large to keep a copy of; $SARIF_SCHEMA, or in a folder `schemas` beside this checkout."""
    beside = [path for folder in DOCS.parents for path in sorted(folder.glob("*/schemas/sarif-schema-2.1.0.json"))]
    named = [Path(os.environ["SARIF_SCHEMA"])] if "SARIF_SCHEMA" in os.environ else []
    return next(iter(named + beside), None)


TEXTUAL = ("text", "grouped", "concise")


def text_of(name: str, report: Report | None = None, **style: object) -> str:
    return formats()[name].render(sample_report() if report is None else report, Style(**style))  # type: ignore[arg-type]


def test_every_promised_format_exists():
    promised = {"text", "concise", "grouped", "json", "jsonl", "sarif", "github", "gitlab", "junit", "markdown", "html"}
    assert set(formats()) == promised


def test_a_format_that_lacks_something_or_repeats_a_name_is_refused():
    module = ModuleType("as_x")
    module.NAME = "x"  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="has no SUMMARY"):
        format_of(module)
    with pytest.raises(TypeError, match="two report formats"):
        register([formats()["json"], formats()["json"]])
    with pytest.raises(UsageError, match="did you mean 'sarif'"):
        format_named("sarfi")


@pytest.mark.parametrize("name", sorted(formats()))
def test_nothing_in_a_report_can_drive_a_terminal(name):
    text = text_of(name)
    bad = sorted({f"U+{ord(c):04X}" for c in text if not c.isprintable() and c != "\n"})
    assert not bad
    assert text.endswith("\n")
    text.encode("utf-8")


@pytest.mark.parametrize("name", sorted(formats()))
def test_the_same_report_gives_the_same_bytes(name):
    assert text_of(name) == text_of(name)


@pytest.mark.parametrize("name", sorted(set(formats()) - {"github"}))
def test_no_line_is_a_command_to_a_ci_runner(name):
    text = text_of(name)
    assert not [line for line in text.splitlines() if line.lstrip().startswith("::")]
    assert "##[" not in text


@pytest.mark.parametrize("name", sorted(formats()))
def test_an_empty_report_is_still_a_document(name):
    text = text_of(name, Report((), "0.1.0"))
    if name in ("json", "sarif", "gitlab"):
        json.loads(text)
    if name == "junit":
        ET.fromstring(text)


@pytest.mark.parametrize("width", [80, 100, 120])
@pytest.mark.parametrize("name", ["text", "grouped"])
def test_lines_fit_the_terminal(name, width):
    for line in text_of(name, width=width).splitlines():
        assert len(line) <= width, line


@pytest.mark.parametrize("name", TEXTUAL)
def test_colour_changes_nothing_but_colour(name):
    plain = text_of(name)
    coloured = text_of(name, colour=True)
    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain


@pytest.mark.parametrize("name", TEXTUAL)
def test_a_terminal_without_unicode_gets_ascii(name):
    text_of(name, unicode=False).encode("ascii")


def test_text_folds_healthy_layers_that_look_alike_and_only_those():
    report = Report((deep_model(),), "0")
    assert "… 117 more like these" in text_of("text", report)
    assert "layers.60.weight" not in text_of("text", report)
    for style in ({"show_healthy": True}, {"verbose": True}):
        shown = text_of("text", report, **style)
        assert all(f"layers.{i}.weight" in shown for i in range(120))
    ill = [dataclasses.replace(deep_model().findings[0], tensor=f"layers.{i}.weight", site="") for i in range(120)]
    shown = text_of("text", Report((dataclasses.replace(deep_model(), findings=tuple(ill)),), "0"))
    assert "more like these" not in shown
    (finding,) = deep_model().findings
    spread = dataclasses.replace(finding, related=tuple(f"layers.{i}.weight" for i in range(1, 120)))
    shown = text_of("text", Report((dataclasses.replace(deep_model(), findings=(spread,)),), "0"))
    assert "✗  … 118 more like these" in shown, "one cause at 120 weights is one cause"


def test_folding_keeps_the_count_of_weights_of_repeating_blocks():
    names = [f"block.{i}.{part}.weight" for i in range(12) for part in ("query", "key", "up", "down")]
    model = dataclasses.replace(healthy_model(), layers=tuple(layer(name) for name in names))
    text = text_of("text", Report((model,), "0"))
    folded = sum(int(n) for n in re.findall(r"… (\d+) more", text))
    assert folded == 40
    assert sum("weight  " in line or ".weight" in line for line in text.splitlines() if "✓" in line) == 8


def test_text_marks_a_weight_only_for_findings_about_its_own_site():
    finding = dataclasses.replace(deep_model().findings[0], tensor="tied", site="head", related=())
    layers = (layer("tied", site="embedding"), layer("tied", site="head"))
    text = text_of("text", Report((dataclasses.replace(healthy_model(), layers=layers, findings=(finding,)),), "0"))
    marks = [line[0] for line in text.splitlines() if re.match(r"[✓✗] +tied", line)]
    assert marks == ["✓", "✗"]


def test_quiet_shows_findings_only():
    assert text_of("text", Report((healthy_model(),), "0"), quiet=True).strip() == ""
    quiet = text_of("text", Report((deep_model(),), "0"), quiet=True)
    assert quiet.startswith("error  IA301")
    assert "gradient  " not in quiet


def test_statistics_count_every_finding():
    for name in TEXTUAL:
        assert re.search(r"^ +5  IA401  nan-or-inf$", text_of(name, statistics=True), re.M)


def test_json_follows_the_published_schema():
    schema = json.loads((DOCS / "report.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    document = json.loads(text_of("json"))
    jsonschema.Draft202012Validator(schema).validate(document)
    broken = json.loads(text_of("json"))
    broken["models"][0]["risk"]["vanishing"] = 2
    assert not jsonschema.Draft202012Validator(schema).is_valid(broken)


def test_json_keeps_names_exactly_and_numbers_finite():
    document = json.loads(text_of("json"), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    names = [entry["tensor"] for entry in document["models"][2]["layers"]]
    assert names[: len(HOSTILE)] == [name.replace("\ud800", "\ufffd") for name in HOSTILE]
    assert document["models"][2]["findings"][0]["measured"] is None
    assert document["models"][0]["layers"][0]["observed"]["skewness"] is None


def test_json_refuses_what_it_cannot_hold():
    model = dataclasses.replace(healthy_model(), layers=(layer("w", observed={"std": object()}),))
    with pytest.raises(TypeError, match="numbers, text"):
        text_of("json", Report((model,), "0"))


def test_jsonl_holds_what_json_holds():
    document = json.loads(text_of("json"))
    lines = [json.loads(line) for line in text_of("jsonl").splitlines()]
    layers = [{k: v for k, v in line.items() if k not in ("type", "source")} for line in lines if line["type"] == "layer"]
    findings = [{k: v for k, v in line.items() if k not in ("type", "source")} for line in lines if line["type"] == "finding"]
    assert layers == [entry for model in document["models"] for entry in model["layers"]]
    assert findings == [entry for model in document["models"] for entry in model["findings"]]
    assert sum(line["type"] == "model" for line in lines) == 5


def test_sarif_follows_the_models_that_are_generated_from_the_official_schema():
    """pydantic-sarif is made from OASIS's schema file by datamodel-codegen: seen to be checked are types, required and unknown
    properties, enumerations and smallest values. `uniqueItems` and formats such as `uri` are not left to it: the lists that the
    schema wants unique are looked at here, and the schema itself is read below where it is at hand."""
    from pydantic import ValidationError
    from pydantic_sarif.model import StaticAnalysisResultsFormatSarifVersion210JsonSchema as Sarif

    document = json.loads(text_of("sarif"))
    Sarif.model_validate_json(json.dumps(document), strict=True)
    for broken in (
        {**document, "runs": [{**document["runs"][0], "results": [{"ruleId": "IA101"}]}]},
        {**document, "runs": [{**document["runs"][0], "surplus": 1}]},
        {**document, "version": "2.0.0"},
        {**document, "runs": [{**document["runs"][0], "columnKind": "bytes"}]},
        {**document, "runs": [{**document["runs"][0], "results": [{**document["runs"][0]["results"][0], "level": "fatal"}]}]},
        {**document, "runs": [{**document["runs"][0], "results": [{**document["runs"][0]["results"][0], "rank": -7.0}]}]},
        {**document, "runs": [{**document["runs"][0], "results": [{**document["runs"][0]["results"][0], "ruleIndex": "1"}]}]},
    ):
        with pytest.raises(ValidationError):
            Sarif.model_validate_json(json.dumps(broken), strict=True)
    (run,) = document["runs"]
    rules = [json.dumps(rule, sort_keys=True) for rule in run["tool"]["driver"]["rules"]]
    assert len(set(rules)) == len(rules)
    for result in run["results"]:
        for unique in ("relatedLocations", "fixes"):
            entries = [json.dumps(entry, sort_keys=True) for entry in result.get(unique, ())]
            assert len(set(entries)) == len(entries)
    uris = [place["physicalLocation"]["artifactLocation"]["uri"] for result in run["results"] for place in result["locations"]]
    # RFC 3986: what may stand in a reference, everything else escaped.
    assert all(re.fullmatch(r"(?:[A-Za-z0-9._~:/?#@!$&'()*+,;=\[\]-]|%[0-9A-Fa-f]{2})+", uri) for uri in uris)


def test_sarif_follows_the_official_schema():
    path = official_sarif_schema()
    if path is None:
        pytest.skip("the official SARIF schema is not on this machine; name it in $SARIF_SCHEMA")
    schema = json.loads(path.read_text())
    document = json.loads(text_of("sarif"))
    jsonschema.validators.validator_for(schema)(schema).validate(document)


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_of_rules_is_no_wider_than_the_terminal(width):
    from initaudit.report.pages import rule_table

    assert width - 16 <= max(map(len, rule_table(all_rules(), width).splitlines())) <= width


def test_sarif_declares_all_rules_and_points_at_lines_or_names():
    (run,) = json.loads(text_of("sarif"))["runs"]
    declared = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert set(declared) >= {rule.code for rule in all_rules()}
    assert all(declared[result["ruleIndex"]] == result["ruleId"] for result in run["results"])
    module, file = run["results"][0]["locations"][0], run["results"][1]["locations"][0]
    assert module["physicalLocation"]["region"] == {"startLine": 7}
    assert module["physicalLocation"]["artifactLocation"]["uri"] == "src/deep.py"
    assert unquote(file["physicalLocation"]["artifactLocation"]["uri"]) == "evil\x1b]0;title\x07.onnx"
    assert [place["kind"] for place in file["logicalLocations"]] == ["operator", "tensor"]
    assert run["invocations"][0]["executionSuccessful"] is False
    assert not [r for r in run["results"] if "](" in r["message"]["text"]]


def test_fingerprints_are_stable_and_differ():
    marks = [mark for _, mark in fingerprints(hostile_model())]
    assert len(set(marks)) == len(marks)
    moved = dataclasses.replace(hostile_model().findings[0], message="other words", measured=1.0, severity="info", related=())
    assert fingerprints(dataclasses.replace(hostile_model(), findings=(moved,)))[0][1] == marks[0]
    sarif = json.loads(text_of("sarif"))["runs"][0]["results"]
    gitlab = [issue["fingerprint"] for issue in json.loads(text_of("gitlab"))]
    assert {r["partialFingerprints"]["initaudit/v1"] for r in sarif} <= set(gitlab)
    assert len(set(gitlab)) == len(gitlab)


def test_github_commands_cannot_be_broken_out_of():
    lines = text_of("github").splitlines()
    assert len(lines) == 1 + sum(len(model.findings) for model in sample_report().models)
    for line in lines:
        assert re.match(r"::(error|warning|notice) (file=[^:,]*,)?(line=\d+,)?title=[^:,]*::", line), line
    levels = [line[2] for line in lines]
    assert levels == sorted(levels, key="ewn".index), "the worst ten are the ones that are shown"


def test_gitlab_issues_have_what_gitlab_reads():
    for issue in json.loads(text_of("gitlab")):
        assert {"description", "check_name", "fingerprint", "severity", "location"} <= set(issue)
        assert issue["severity"] in ("info", "minor", "major", "critical", "blocker")
        assert issue["location"]["lines"]["begin"] >= 1


def test_junit_counts_what_it_holds_and_fails_what_fails_the_run():
    root = ET.fromstring(text_of("junit"))
    assert root[0].get("name") == "good.onnx"
    for suite in root:
        assert int(suite.get("tests")) == len(suite.findall("testcase"))
        assert int(suite.get("failures")) == len(suite.findall("testcase/failure"))
        assert int(suite.get("errors")) == len(suite.findall("testcase/error"))
    assert int(root.get("errors")) == 1
    strict = ET.fromstring(text_of("junit", failing=("error", "warning")))
    assert int(strict.get("failures")) > int(root.get("failures")) > 0


def test_markdown_fits_a_comment_whatever_the_size():
    findings = tuple(dataclasses.replace(deep_model().findings[0], tensor=f"layers.{i}.{'x' * 200}") for i in range(2000))
    text = text_of("markdown", Report((dataclasses.replace(deep_model(), findings=findings),), "0"))
    assert len(text) <= LIMIT + 200
    assert "parts more are left out" in text


def test_markdown_tables_keep_their_columns_and_names_stay_names():
    text = text_of("markdown")
    for line in text.splitlines():
        if line.startswith("|"):
            bare = re.sub(r"`[^`]*`", "", line).replace("\\|", "")
            assert bare.count("|") in (5, 11), line
    prose = re.sub(r"`[^`\n]+`", "", text)
    assert not re.search(r"(?<!\\)<(?!!-- -->|/?details|/?summary)", prose)
    assert not [text for text in ("@someone", "#1", "](http") if text in prose]


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        assert not [name for name, _ in attributes if name.startswith("on") or name in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_html_is_one_page_without_scripts_and_with_a_picture():
    text = text_of("html")
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert page.tags.count("svg") == 2
    assert "http" not in re.sub(r"http(-equiv|:/)", "", text)
    assert page.tags.count("circle") == 2 * (2 + 120)


def test_a_curve_with_holes_and_zeros_is_drawn():
    curve = ((None, 1.0), (0.0, None), (float("inf"), 2.0), (1e-30, 3.0))
    model = dataclasses.replace(healthy_model(), depth=curve)
    assert "nan" not in text_of("html", Report((model,), "0"))
    assert "signal" in text_of("text", Report((model,), "0"))
    unknown = dataclasses.replace(healthy_model(), depth=((None, None),) * 3)
    assert "<svg" not in text_of("html", Report((unknown,), "0"))


def test_an_unreadable_model_is_named_in_every_format():
    report = Report((ModelReport("gone.onnx", "unknown", error="gone.onnx: no such file"),), "0")
    for name in set(formats()) - set(TEXTUAL):
        assert "gone.onnx" in text_of(name, report), name
    assert text_of("text", report) == "", "its line is on stderr already"
    assert "not read: gone.onnx" in text_of("text", Report((*report.models, healthy_model()), "0"))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (0, "0"),
        (1, "1"),
        (0.98765, "0.988"),
        (999.6, "1000"),
        (1234, "1234"),
        (9999.9, "1e4"),
        (-0.05, "-0.05"),
    ],
)
def test_numbers_are_short(value, text):
    assert number(value) == text


@pytest.mark.parametrize("value", [10.0**e * s for e in range(-40, 39, 3) for s in (1, -1, 1.23456, 9.9999)])
def test_numbers_fit_their_column(value):
    assert len(number(value)) <= 8
    assert float(number(value)) == pytest.approx(value, rel=0.06)


def test_names_are_shortened_in_the_middle():
    assert shorten("abcdefghij", 10) == "abcdefghij"
    assert shorten("abcdefghijk", 10) == "abc…fghijk"
    assert [len(shorten("x" * 50, n)) for n in range(8)] == list(range(8))


def test_escape_leaves_ordinary_names_alone():
    for name in ("layers.0.weight", "aten::linear", "Ж中é", "a/b:0", "x[1]"):
        assert escape(name) == name


def test_a_comparison_is_paged_and_complete_where_it_is_asked_for():
    from initaudit.report.comparison import PAGE, compare_models, comparison_dict, comparison_text

    first, second = deep_model(), dataclasses.replace(deep_model(), layers=(), findings=())
    result = compare_models(first, second)
    assert len(result.only_first) > PAGE
    text = comparison_text(result, Style(width=80))
    assert f"... and {len(result.only_first) - PAGE} more (--verbose shows all)" in text
    assert text.count("only in the first") == PAGE
    assert max(map(len, text.splitlines())) <= 80
    whole = comparison_text(result, Style(width=80, verbose=True))
    assert whole.count("only in the first") == len(result.only_first)
    assert comparison_dict(result)["only_first"] == list(result.only_first)
