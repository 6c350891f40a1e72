"""Every rule is judged by its own examples; the set of rules by what a reader may expect of it."""

import ast
import dataclasses
import json
import math
import re
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from initaudit.auditing.run import gather
from initaudit.config import Config
from initaudit.load import from_module
from initaudit.rules import all_rules
from initaudit.rules.health import health
from initaudit.rules.ia310_large_initial_logits import expected_loss
from initaudit.rules.roots import CAUSES, findings_of, fold
from initaudit.rules.rule import EXACT, SEVERITIES, Finding
from initaudit.rules.support import ratio_of, view

SAID = Path(__file__).resolve().parents[1] / "docs" / "examples.json"
RULES = {r.code: r for r in all_rules()}
# Those that judge a tensor: each of their findings owes its reader six things.
STATIC = {c for c in RULES if c.startswith(("IA1", "IA2", "IA4", "IA5", "IA601"))} - {"IA502", "IA505", "IA507"}
CONSEQUENCE = re.compile(
    r"learn|gradient|signal|train|step|start|alone|NaN|infinite|float16|contributes|loaded|drift|grow|sends? on|computes|"
    r"initialization gives|ends at",
)
EXAMPLES = [(r.code, kind, e) for r in RULES.values() for kind in ("valid", "invalid") for e in getattr(r, kind)()]


def evidence_of(module, inputs=None, **config):
    """Evidence about a module, which is taken for untrained unless `config` says otherwise."""
    return gather(from_module(module), Config(**{"phase": "init", **config}), inputs=inputs)


@pytest.mark.parametrize(("code", "kind", "example"), EXAMPLES, ids=[f"{c}-{k}-{e.name}" for c, k, e in EXAMPLES])
def test_example(code, kind, example, overwrite):
    module, inputs = example.build()
    trained = RULES[code].phase == "trained" or code == "IA601"
    evidence = evidence_of(module, inputs, phase="auto" if trained else "init")
    found = list(RULES[code].check(evidence))
    if kind == "invalid":
        assert found, "the rule does not see its own example"
        # After folding the example still shows: by this code, or by the cause that explains it.
        left = findings_of(evidence)
        assert any(code == f.code or f"({code})" in f.message for f in left)
        if code.startswith("IA3") and evidence.trace is not None:
            # The signal and the gradient by depth, wherever there are two places to compare.
            deep = len({w.output for w in evidence.trace.weights}) > 2
            assert [bool(f.profile) for f in left if code == f.code or f"({code})" in f.message].count(True) > 0 or not deep
    else:
        assert not found, found[0].message
        assert [f for f in findings_of(evidence) if f.severity != "info"] == [], "a healthy example alarms another rule"
    for finding in found:
        judge_text(finding)
        if code in STATIC:
            judge_elements(finding)
    if kind == "invalid":
        judge_page(code, example.name, as_shown(found[0]), overwrite)


def as_shown(finding):
    """The finding as the rule's page prints it."""
    head = "  ".join([finding.severity, f"{finding.code} {finding.name}", finding.tensor or finding.site or ""]).rstrip()
    body = [textwrap.wrap(text, 98) for text in (finding.message, f"help: {finding.help}")]
    return "\n".join([head, *(f"  {line}" for lines in body for line in lines)])


def judge_page(code, name, text, overwrite):
    """The page of a rule shows what its examples are told; digits may differ from machine to machine, words may not."""
    said = json.loads(SAID.read_text("utf-8")) if SAID.exists() else {}
    if overwrite:
        said.setdefault(code, {})[name] = text
        SAID.write_text(json.dumps(said, indent=1, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")
    shown = said.get(code, {}).get(name, "")
    assert words(shown) == words(text), "if the new text is right: pytest tests/test_rules.py --overwrite; docs/generate.py"


def words(text):
    return re.sub(r"\d[\d.,]*(e[+-]?\d+)?", "0", " ".join(text.split()))


def test_no_page_shows_an_example_that_is_gone():
    said = json.loads(SAID.read_text("utf-8"))
    assert {(c, n) for c, shown in said.items() for n in shown} == {(c, e.name) for c, kind, e in EXAMPLES if kind == "invalid"}


def judge_elements(finding):
    """Measured, expected, by which law, how many standard errors apart, what it does to training, the line to type."""
    assert finding.measured is not None, "nothing is said to be measured"
    assert finding.expected is not None, "nothing is said to be expected"
    assert finding.law.removeprefix(EXACT).strip(), "no law"
    exact = finding.law.startswith(EXACT)
    assert exact == (finding.standard_errors is None), "standard errors, or a law that says that there are none"
    assert exact or math.isfinite(finding.standard_errors)
    assert CONSEQUENCE.search(finding.message), finding.message
    ast.parse(finding.help)
    assert re.search(r"torch\.|\.tie_weights\(\)| = model\.|initaudit\.audit\(", finding.help), finding.help
    assert len(finding.message.split()) <= 70, "more than is read at a glance"


def judge_text(finding):
    """What every finding owes its reader."""
    assert finding.severity in SEVERITIES
    assert finding.message[0] not in " ;,"
    assert not finding.message.endswith((".", ";", ",", " "))
    assert "  " not in finding.message
    assert "\n" not in finding.message + finding.help
    assert not re.search(r"\b(nan|None)\b", finding.message)
    for value in (finding.measured, finding.expected):
        assert value is None or math.isfinite(value)
    assert finding.help


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_docstring_is_a_page(rule):
    page = rule.__doc__
    for part in ("What it does:", "Why it is bad:", "Example:", "Instead:", "Source:"):
        assert part in page, f"{rule.code} does not say {part}"
    assert rule.severity in SEVERITIES


def test_examples_repeat_and_leave_the_random_state_alone():
    before = torch.get_rng_state()
    for _, _, example in EXAMPLES[::7]:
        a, b = example.build()[0], example.build()[0]
        states = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
        assert all(x.numpy().tobytes() == y.numpy().tobytes() for x, y in states)
    assert torch.equal(before, torch.get_rng_state())


def test_causes_name_rules_and_come_before_what_they_explain():
    order = [cause for cause, _, _ in CAUSES]
    assert len(order) == len(set(order))
    for cause, anywhere, same in CAUSES:
        assert cause in RULES
        for code in (*anywhere, *same):
            assert code in RULES
            assert code not in order or order.index(code) > order.index(cause) or code == "IA201", (cause, code)


def finding(code, severity="error", tensor="a", related=()):
    return Finding(code, RULES[code].name, severity, "so", "do", tensor=tensor, related=related)


def test_consequences_fold_into_their_root():
    found = [finding("IA301"), finding("IA303"), finding("IA103", "warning", related=("b",)), finding("IA101", tensor="b")]
    (root,) = fold(found)
    assert root.code == "IA103"
    assert root.severity == "error"
    assert {"IA301", "IA303", "IA101"} <= set(re.findall(r"IA\d{3}", root.message))


def test_a_remark_explains_nothing_and_strangers_stay_apart():
    assert len(fold([finding("IA105", "info"), finding("IA301")])) == 2
    assert len(fold([finding("IA201", tensor="a"), finding("IA202", tensor="b")])) == 2


def test_the_scale_of_other_weights_is_a_consequence_unless_it_would_harm_alone():
    def small(ratio, related=()):
        return dataclasses.replace(finding("IA101", tensor="b", related=related), measured=ratio, expected=1.0)

    dead = finding("IA111", tensor="a")
    assert [f.code for f in fold([dead, small(0.1)])] == ["IA111"]
    assert [f.code for f in fold([dead, small(1e-6)])] == ["IA111", "IA101"]
    assert [f.code for f in fold([dead, small(0.1, tuple("cdefghij"))])] == ["IA111", "IA101"]


def test_folding_twice_is_folding_once():
    found = [finding(code) for code in RULES]
    once = fold(found)
    assert fold(once) == once


def test_selection_leaves_the_symptom_where_its_cause_is_not_asked_for():
    module, inputs = RULES["IA103"].invalid()[0].build()
    assert [f.code for f in findings_of(evidence_of(module, inputs, select=("IA303",)))] == ["IA303"]


@pytest.mark.parametrize("classes", [2, 10, 1000])
@pytest.mark.parametrize("std", [0.0, 0.5, 4.0])
def test_expected_loss_is_that_of_torch(classes, std):
    logits = std * torch.randn(4000, classes, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(0, classes, (4000,), generator=torch.Generator().manual_seed(2))
    losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    # 256 draws stand behind the rule's number, 4000 behind this one.
    assert expected_loss(std, classes) == pytest.approx(float(losses.mean()), abs=5 * float(losses.std()) / 16 + 1e-6)


def test_expected_loss_of_a_large_vocabulary_is_extrapolated():
    logits = 3 * torch.randn(64, 50000, generator=torch.Generator().manual_seed(1))
    assert expected_loss(3.0, 50000) == pytest.approx(float(logits.logsumexp(1).mean()), rel=0.05)


def stack(depth, gain, width=64):
    torch.manual_seed(0)
    layers = []
    for _ in range(depth):
        layer = nn.Linear(width, width)
        nn.init.normal_(layer.weight, 0, gain / math.sqrt(width))
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 5)), (torch.randn(64, width),)


@pytest.mark.parametrize("gain", [0.5, 1.0, 1.4142, 3.0])
def test_signal_and_gradient_follow_the_closed_form(gain):
    """Each ReLU layer multiplies the second moment by gain²/2 in both directions (He et al. 2015, eq. 9 and 14)."""
    depth = 6
    evidence = evidence_of(*stack(depth, gain))
    flow, state = view(evidence).flow, health(evidence)
    last = evidence.layers[depth - 1]
    step = math.log(gain**2 / 2)
    assert math.log(flow.size[last.pair.node]) == pytest.approx(math.log(gain**2) + (depth - 1) * step, abs=1.0)
    # On the way back a loss is followed along the way that keeps most; there is only one here. The first layer learns by what
    # arrives at its output.
    assert math.log(state.gradient) == pytest.approx(min(0, (depth - 1) * step), abs=1.5) or gain > 2
    assert ratio_of(last) == pytest.approx(gain**2 / 2, rel=0.1)


def test_a_gate_takes_nothing_from_the_signal():
    class Gated(nn.Module):
        def __init__(self, gate):
            super().__init__()
            self.first, self.second, self.gate = nn.Linear(32, 32), nn.Linear(32, 32), nn.Parameter(torch.full((32,), gate))
            self.head = nn.Linear(32, 4)

        def forward(self, x):
            return self.head(x + self.gate * self.second(torch.tanh(self.first(x))))

    for gate in (1.0, 1e-6, 0.0):
        torch.manual_seed(0)
        state = health(evidence_of(Gated(gate), (torch.randn(16, 32),)))
        assert state.vanishing == ""
        assert state.exploding == ""


def test_a_norm_written_out_counts_as_a_norm():
    class Rms(nn.Module):
        def forward(self, x):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    torch.manual_seed(0)
    layers = [m for _ in range(8) for m in (nn.Linear(48, 48), Rms(), nn.ReLU())]
    module = nn.Sequential(*layers, nn.Linear(48, 4))
    for m in module:
        if isinstance(m, nn.Linear):
            nn.init.normal_(m.weight, 0, 0.01)
            nn.init.zeros_(m.bias)
    assert [f for f in findings_of(evidence_of(module, (torch.randn(16, 48),))) if f.severity != "info"] == []


def test_no_init_rule_judges_a_trained_network():
    for code in ("IA101", "IA103", "IA107", "IA201", "IA203", "IA303", "IA310"):
        module, inputs = RULES[code].invalid()[0].build()
        evidence = evidence_of(module, inputs, phase="trained")
        init = [f for f in findings_of(evidence) if RULES[f.code].phase == "init"]
        assert init == []


def test_a_mask_of_infinities_is_no_weight():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.register_buffer("mask", torch.full((8, 8), float("-inf")).triu(1))

        def forward(self, x):
            return (self.layer(x) + self.mask).softmax(-1) @ x

    assert list(RULES["IA401"].check(evidence_of(Masked(), (torch.randn(4, 8, 8),)))) == []


def test_problems_of_the_loader_become_findings():
    from initaudit.load.checkpoint import Problem

    evidence = evidence_of(nn.Linear(4, 4), (torch.randn(2, 4),))
    problems = tuple(Problem(code, "a.weight", "cut off") for code in ("IA001", "IA502", "IA503", "IA505"))
    evidence = dataclasses.replace(evidence, checkpoint=dataclasses.replace(evidence.checkpoint, problems=problems))
    for problem in problems:
        (found,) = RULES[problem.code].check(evidence)
        assert found.tensor == "a.weight"
        judge_text(found)
        if found.code in STATIC:
            judge_elements(found)


def test_without_a_probe_it_is_said():
    evidence = evidence_of(nn.Linear(4, 4), (torch.randn(2, 4),), probe=False)
    (found,) = RULES["IA004"].check(evidence)
    assert "--no-probe" in found.message
    assert [f.severity for f in findings_of(evidence)] == ["info"]


def test_a_file_without_a_program_is_paired_with_nothing(tmp_path):
    from safetensors.torch import save_file

    from initaudit.load import load

    save_file({"fc.weight": torch.randn(32, 16), "fc.bias": torch.zeros(32)}, tmp_path / "m.safetensors")
    evidence = gather(load(str(tmp_path / "m.safetensors")), Config())
    assert [f.tensor for f in RULES["IA003"].check(evidence)] == ["fc.weight"]
    assert "no program" in next(RULES["IA004"].check(evidence)).message


def test_an_operator_of_a_strange_domain_is_named():
    from onnx import TensorProto, helper

    from initaudit.load import load_proto

    weight = helper.make_tensor("w", TensorProto.FLOAT, [8, 8], torch.randn(64).tolist())
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="first"),
        helper.make_node("Whirl", ["h"], ["y"], name="strange", domain="com.nobody"),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [4, 8]) for n in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], [weight])
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("com.nobody", 1)]
    evidence = gather(load_proto(helper.make_model(graph, opset_imports=imports, ir_version=10)), Config())
    (found,) = RULES["IA002"].check(evidence)
    assert "com.nobody.Whirl" in found.message
    assert found.site == "strange"
