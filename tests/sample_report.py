"""One report that every format is fed: all severities and phases, hostile names, unknown numbers, a deep network."""

from __future__ import annotations

from initaudit.location import Location
from initaudit.report.report import Activation, Layer, ModelReport, Report
from initaudit.rules.rule import Finding

# Names as a hostile file may hold them: escape sequences, line breaks, commands to a CI runner, markup, unpaired surrogates.
HOSTILE = (
    "fc\x1b[31m.weight",
    "a\nb\r\nc\td\x00e\x7ff\x9b2J",
    "::error file=x,line=1::injected",
    "##[set-output name=x]y",
    "<script>alert('x')</script>|`*_[link](http://x)",
    "bidi\u202etxt.exe\u2066",
    "lone\ud800surrogate",
    "a]]>b<!--c--></testcase>%0A&amp;@someone #1",
    "weights\u0416\u4e2d" + "x" * 300,
    "",
)


def layer(name: str, *, ratio: float | None = 1.0, shape: tuple[int, ...] = (256, 128), **fields: object) -> Layer:
    """A layer after a He initialization whose variance is `ratio` times what ReLU asks for."""
    values: dict[str, object] = {
        "tensor": name,
        "site": name.removesuffix(".weight"),
        "operator": "linear",
        "role": "contraction",
        "shape": shape,
        "fan_in": 128,
        "fan_out": 256,
        "groups": 1,
        "activations": (Activation("relu", 2**0.5, ("batch_norm",)),),
        "observed": {"mean": 1e-4, "variance": 0.0156, "std": 0.125, "zeros": 0, "nan": 0, "inf": 0, "skewness": float("nan")},
        "expected": {"xavier": 0.0052, "he": 0.0156, "lecun": 0.0078, "exact": 0.0156, "standard_error": 1e-4},
        "ratio": {
            "xavier": None if ratio is None else 3 * ratio,
            "he": ratio,
            "lecun": None if ratio is None else 2 * ratio,
            "exact": ratio,
        },
        "schemes": ({"name": "kaiming_normal(fan_in, relu)", "p_value": 0.4},),
        "phase": "init",
        "probe": {"forward_moment2": 1.0, "gradient_moment2": 1e-3, "dead": 0.5, "saturated": None},
        "provenance": ("Transpose",),
        "location": {"file": "src/net.py", "line": 12},
    }
    return Layer(**{**values, **fields})  # type: ignore[arg-type]


def deep_model(depth: int = 120) -> ModelReport:
    """A deep stack whose signal dies: one row is reported, the others look alike."""
    findings = (
        Finding(
            "IA301",
            "forward-vanishing",
            "error",
            f"the second moment of the signal shrinks from 1 to {0.5**depth:.1e} over {depth} layers",
            "initialise with torch.nn.init.kaiming_normal_(weight, nonlinearity='relu')",
            tensor="layers.0.weight",
            site="layers.0",
            location=Location("layers.0", "src/deep.py", 7),
            measured=0.5**depth,
            expected=1.0,
            related=tuple(f"layers.{i}.bias" for i in range(1, 8)),
        ),
    )
    layers = tuple(layer(f"layers.{i}.weight", site=f"layers.{i}") for i in range(depth))
    curve = tuple((0.5**i, 0.5 ** (depth - i)) for i in range(depth))
    risk = {"symmetry": 0.0, "vanishing": 0.98, "exploding": 0.0, "untrainable": {"sgd": 0.99, "adam": 0.4}}
    return ModelReport("deep.net:Net", "module", "init", "fail", risk, layers, findings, curve, cause="the variance halves")


def hostile_model() -> ModelReport:
    """A trained file whose every name is an attack."""
    layers = (
        *(layer(name, ratio=None if i % 2 else 0.01, phase="trained", site=name) for i, name in enumerate(HOSTILE)),
        layer("table", operator="embedding", role="embedding", shape=(50257, 768), activations=(), ratio=None),
        layer(
            "scalar",
            shape=(),
            operator="conv_transpose3d",
            activations=(Activation("leaky_relu", None), Activation("tanh", 1.6)),
        ),
    )
    severities = ("error", "warning", "info")
    findings = tuple(
        Finding(
            "IA401" if i % 3 == 0 else "IA109" if i % 3 == 1 else "IA003",
            "nan-or-inf" if i % 3 == 0 else "odd-one-out" if i % 3 == 1 else "unpaired-weight",
            severities[i % 3],  # type: ignore[arg-type]
            f"{name} is not as it should be",
            f"look at {name}",
            tensor=name,
            site=f"/node/{name}",
            location=Location(f"/node/{name}"),
            measured=float("nan"),
            expected=None,
            related=(HOSTILE[0], name),
        )
        for i, name in enumerate(HOSTILE)
    )
    # The same rule twice about one tensor at one operator: fingerprints must differ.
    findings += (findings[0],)
    return ModelReport("evil\x1b]0;title\x07.onnx", "onnx", "trained", "warn", {}, layers, findings, notes=("odd\x1b[2Jnote",))


def healthy_model() -> ModelReport:
    """Two layers and nothing to say."""
    risk = {"symmetry": 0.0, "vanishing": 0.01, "exploding": 0.02, "untrainable": {"sgd": 0.03, "adam": 0.02}}
    curve = ((1.0, 1.1), (0.9, 1.0))
    return ModelReport("good.onnx", "onnx", "init", "pass", risk, (layer("fc1.weight"), layer("fc2.weight")), (), curve)


def sample_report() -> Report:
    """Healthy, deep, hostile, empty and unreadable models in one run."""
    empty = ModelReport("empty.safetensors", "safetensors", "mixed", "pass")
    unreadable = ModelReport("gone\n.onnx", "unknown", error="gone\n.onnx: no such file; check the path")
    return Report((healthy_model(), deep_model(), hostile_model(), empty, unreadable), "0.1.0", 1.25)
