"""`hf-teleport doctor`: check that everything needed is installed, and tell what a teleport would do to a model.

It checks libraries, devices, distributed backends and the Hub. Libraries that take seconds to import are imported in the
functions that check them.
"""

import argparse
import json
import os
import platform
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from hf_teleport.commands.parser import MODEL, Subparsers, add_command, add_inputs
from hf_teleport.config import TeleportConfig
from hf_teleport.display.quantities import size

if TYPE_CHECKING:
    from torch import nn

    from hf_teleport.inspection import Inspection
    from hf_teleport.layers.point import LossFn

_PACKAGE = "hf_teleport"

# The extra for developers of the package, which users don't need.
_NOT_FOR_USERS = "dev"


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        subject: what was checked, for instance a library.
        found: its version, or a description. Empty: it is missing.
        wanted: the supported versions. Empty: any.
        ok: whether it is present and supported.
        required: whether the package needs it.
        advice: what to do if it is not ok.
    """

    subject: str
    found: str
    wanted: str = ""
    ok: bool = True
    required: bool = False
    advice: str = ""


@dataclass(frozen=True)
class Prognosis:
    """What teleportation would do to a model.

    Attributes:
        roles: a line for each role of weights: how many move on this batch by method 'null_space', and why the others do not.
        method: the method that 'auto' chooses with AdamW.
        why: why 'auto' does not choose 'basis'. Empty: it does.
    """

    roles: list[str]
    method: str
    why: str


def add_to(subparsers: Subparsers) -> None:
    """Add the parser."""
    command = add_command(
        subparsers,
        "doctor",
        run,
        help="check that everything needed is installed, and tell what a teleport would do to a model",
        description="Checks libraries, devices, distributed backends and the Hub. Prints a line for each, and what to do if "
        "something is wrong. Exit code 0: everything required is installed, in supported versions; 1: something is not.",
        epilog="For instance:\n  hf-teleport doctor --model path/to/model",
    )
    command.add_argument("--model", help=f"tell what would move in this model, and what method 'auto' would choose: {MODEL}")
    add_inputs(command)
    command.add_argument("--json", action="store_true", help="print JSON instead of lines")


def run(arguments: argparse.Namespace) -> int:
    """Make all checks and print them. Returns the exit code."""
    findings, prognosis = examine(), None
    if arguments.model:
        from hf_teleport.inputs.models import model_and_batch
        from hf_teleport.inputs.synthetic import synthetic_loss

        model, batch = model_and_batch(arguments.model, arguments.set, arguments.data, arguments.batch_size, arguments.length)
        prognosis = foretell(model, batch, synthetic_loss)
    print(json.dumps(to_dict(findings, prognosis), indent=1) if arguments.json else "\n".join(sentences(findings, prognosis)))
    return 0 if healthy(findings) else 1


def healthy(findings: Iterable[Finding]) -> bool:
    """Whether everything required is present and supported."""
    return all(finding.ok for finding in findings if finding.required)


def examine() -> list[Finding]:
    """Check everything about this machine and its Python."""
    return [*libraries(), *devices(), *backends(), hub()]


def libraries() -> list[Finding]:
    """Check Python, this package, and the libraries in its metadata. Libraries of an extra are optional."""
    try:
        about = metadata.metadata(_PACKAGE).json
    except metadata.PackageNotFoundError:
        advice = "run from where it is installed, or: pip install --editable path/to/the/clone"
        return [Finding(_PACKAGE, "", ok=False, required=True, advice=advice)]
    needed = SpecifierSet(str(about.get("requires_python", "")))
    python = platform.python_version()
    fits = needed.contains(python, prereleases=True)
    advice = "" if fits else f"make a virtual environment with a Python {needed}"
    found = [
        Finding("python", python, str(needed), fits, True, advice),
        Finding(_PACKAGE, metadata.version(_PACKAGE)),
    ]
    extras = [extra for extra in about.get("provides_extra", []) if extra != _NOT_FOR_USERS]
    seen = set()
    for line in metadata.requires(_PACKAGE) or []:
        requirement = Requirement(line)
        optional = requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
        asked_for = not optional or any(requirement.marker.evaluate({"extra": extra}) for extra in extras)  # type: ignore[union-attr]
        if asked_for and requirement.name not in seen:
            seen.add(requirement.name)
            found.append(_library(requirement, optional))
    return sorted(found, key=lambda finding: finding.subject not in ("python", _PACKAGE) and not finding.required)


def _library(requirement: Requirement, optional: bool) -> Finding:
    wanted = str(requirement.specifier)
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        version = ""
    ok = bool(version) and requirement.specifier.contains(version, prereleases=True)
    advice = "" if ok else f"{'' if version else 'not installed; '}pip install '{requirement.name}{wanted}'"
    return Finding(requirement.name, version, wanted, ok, not optional, advice)


def devices() -> list[Finding]:
    """Cores and memory of this machine, and its accelerators with their memory."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = psutil.virtual_memory()
    found = [
        Finding("CPU", f"{cores} cores, {torch.get_num_threads()} threads used by torch"),
        Finding("memory", f"{size(memory.available)} free of {size(memory.total)}"),
    ]
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        found.append(Finding(f"cuda:{index}", f"{about.name}, {size(about.total_memory)}"))
    if torch.backends.mps.is_available():
        found.append(Finding("mps", size(torch.mps.recommended_max_memory())))
    if len(found) == 2:
        found.append(Finding("accelerator", "none: everything runs on the CPU"))
    return found


def backends() -> list[Finding]:
    """The backends by which several processes can communicate."""
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        return [Finding("distributed", "", ok=False, advice="this build of torch runs in one process only")]
    there = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
    text = ", ".join(name for name, available in there.items() if available)
    lacking = torch.cuda.device_count() > 1 and not there["nccl"]
    advice = "several CUDA devices need nccl: install a build of torch that has it" if lacking else ""
    return [Finding("distributed", text, ok=bool(text) and not lacking, advice=advice)]


def hub(timeout: float = 5.0) -> Finding:
    """Whether models and data can be downloaded.

    Args:
        timeout: seconds to wait for an answer.
    """
    import huggingface_hub
    from huggingface_hub import constants

    if huggingface_hub.is_offline_mode():
        return Finding("Hub", "offline mode (HF_HUB_OFFLINE): only what is cached, and local files")
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=timeout)
    except Exception as error:  # the client library decides on the type
        advice = "local and cached files still work; HF_HUB_OFFLINE=1 saves waiting for the Hub, HF_ENDPOINT names a mirror"
        return Finding("Hub", f"{constants.ENDPOINT} does not answer ({type(error).__name__})", ok=False, advice=advice)
    return Finding("Hub", f"{constants.ENDPOINT} answers")


def foretell(model: "nn.Module", batch: Any, loss_fn: "LossFn") -> Prognosis:
    """What teleportation would do to a model. The weights stay as they are.

    Args:
        batch: whatever `loss_fn` takes.
        loss_fn: returns the mean loss of a batch.

    Raises:
        ValueError: as `inspect_model`.
    """
    import torch

    from hf_teleport.inspection import inspect_model
    from hf_teleport.teleporter import Teleporter

    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    inspection = inspect_model(model, batch, loss_fn)
    config, why = Teleporter(model, TeleportConfig(), optimizer=optimizer).choose(batch, loss_fn)
    return Prognosis(_roles(inspection), config.method, why)


def _roles(inspection: "Inspection") -> list[str]:
    """A line for each role. It shortens a reason to the part before the colon; `hf-teleport inspect` prints all of it."""
    lines = []
    for role in dict.fromkeys(layer.role for layer in inspection.layers):
        layers = [layer for layer in inspection.layers if layer.role == role]
        reasons = Counter(layer.reason.partition(":")[0] for layer in layers if not layer.moved)
        moved = len(layers) - reasons.total()
        others = "".join(f"; {count} not: {reason}" for reason, count in reasons.most_common())
        lines.append(f"{role:10} {moved} of {len(layers)} move{others}")
    return lines


def to_dict(findings: list[Finding], prognosis: Prognosis | None = None) -> dict[str, Any]:
    """Everything as plain values, for JSON."""
    told = {"ok": healthy(findings), "executable": sys.executable, "findings": [asdict(finding) for finding in findings]}
    return told if prognosis is None else told | {"model": asdict(prognosis)}


def sentences(findings: list[Finding], prognosis: Prognosis | None = None) -> list[str]:
    """The lines to print: one for each finding and each role."""
    subjects = max((len(finding.subject) for finding in findings), default=0)
    # Descriptions of devices are long, and would push all version ranges to the right.
    founds = max((len(finding.found) for finding in findings if len(finding.found) < 20), default=0)
    lines = []
    for finding in findings:
        mark = "ok" if finding.ok else "BAD" if finding.required else "-"
        detail = f"{'needs' if finding.required else 'optional,'} {finding.wanted}" if finding.wanted else ""
        row = f"{mark:3} {finding.subject:{subjects}}  {finding.found or 'missing':{founds}}  {detail}"
        lines.append(row.rstrip() + (f"  -> {finding.advice}" if finding.advice else ""))
    if prognosis is not None:
        turns = "`hf-teleport inspect --method basis` says what turns"
        more = f". {turns}" if prognosis.method == "basis" else f" ({prognosis.why.rstrip('.')})"
        lines += ["", "Method 'null_space':", *prognosis.roles, "", f"Method 'auto' with AdamW: {prognosis.method}{more}."]
    bad = [finding.subject for finding in findings if finding.required and not finding.ok]
    return [*lines, "", f"Missing or unsupported: {', '.join(bad)}." if bad else "Everything required is installed."]
