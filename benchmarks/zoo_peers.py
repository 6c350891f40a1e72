"""What other tools say of the same weights: the tensors that they object to.

weightlens, model-clinic and syndset where they are installed, TheDeepChecker's and DeepDiagnosis's published rules as restated
from their papers: a variance ratio beyond 2.70554 of He's (Ben Braiek & Khomh 2023), a variance outside 1e-5 to 10 (Wardat et
al. 2022).
"""

from __future__ import annotations

import importlib.util
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from zoo_models import quiet

_RATIO = 2.70554
_LEAST, _MOST = 1e-5, 10.0


def deep_checker(module: nn.Module) -> set[str]:
    """Weights whose variance is more than 2.70554 times He's, or less than its inverse."""
    found = set()
    for name, w in _weights(module):
        fan = w[0].numel() if w.dim() > 1 else 1
        ratio = float(w.var()) / (2 / fan)
        if not 1 / _RATIO < ratio < _RATIO:
            found.add(name)
    return found


def deep_diagnosis(module: nn.Module) -> set[str]:
    """Weights whose variance lies outside 1e-5 to 10."""
    return {name for name, w in _weights(module) if not _LEAST < float(w.var()) < _MOST}


def syndset(module: nn.Module) -> set[str]:
    """syndset's check of the scale of an initialization."""
    from syndset import check_initialization_scale

    issues = check_initialization_scale(module)["issues"]
    return {n for n, _ in module.named_parameters() if any(f"'{n}'" in issue for issue in issues)}


def model_clinic(module: nn.Module) -> set[str]:
    """model-clinic's findings at WARN or ERROR."""
    from model_clinic.clinic import diagnose

    state = {n: t.detach() for n, t in module.state_dict().items()}
    return {f.param_name for f in diagnose(state, plugins=False) if f.severity in ("WARN", "ERROR")}


def weightlens(module: nn.Module) -> set[str]:
    """weightlens's flags, and the tensors that it skips as not finite."""
    from weightlens import cli

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.pt"
        torch.save(module.state_dict(), file)
        analyzer = cli.Analyzer(
            source=cli.PyTorchWeightSource(file),
            validator=cli.PyTorchCheckpointValidator(file),
            stats_engine=cli.BasicStatsEngine(),
            aggregator=cli.StreamingGlobalAggregator(),
            rules=cli._build_rules(
                variance_threshold=10.0, spike_threshold=100.0, norm_threshold=None, sparsity_threshold=0.9999
            ),
            classifier=cli.PyTorchParameterClassifier(),
            num_workers=1,
        )
        result = analyzer.analyze()
    skipped = {o.name for o in result.coverage.omissions if o.kind == "skipped"}
    return {flag.layer for flag in result.diagnostics} | skipped


PEERS: Mapping[str, Callable[[nn.Module], set[str]]] = {
    "TheDeepChecker's rule": deep_checker,
    "DeepDiagnosis's rule": deep_diagnosis,
    "syndset": syndset,
    "model-clinic": model_clinic,
    "weightlens": weightlens,
}
_PACKAGES = {"syndset": "syndset", "model-clinic": "model_clinic", "weightlens": "weightlens"}


def peers(module: nn.Module) -> dict[str, tuple[list[str], float]]:
    """For every peer that can be run, the tensors that it names and the seconds that it took."""
    found = {}
    for name, ask in PEERS.items():
        if name in _PACKAGES and importlib.util.find_spec(_PACKAGES[name]) is None:
            continue
        began = time.process_time()
        with quiet():
            try:
                named = ask(module)
            except (ArithmeticError, RuntimeError, ValueError):  # LinAlgError: weights that it cannot read, it cannot name
                named = set()
        found[name] = (sorted(named), round(time.process_time() - began, 4))
    return found


def _weights(module: nn.Module) -> list[tuple[str, Tensor]]:
    weights = [(n, p.detach()) for n, p in module.named_parameters() if p.dim() > 1 and math.prod(p.shape) > 1]
    return [(n, w) for n, w in weights if w.is_floating_point()]
