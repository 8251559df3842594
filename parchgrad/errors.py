"""Every exception the library raises. No HTTP here: the service maps these to status codes."""

from __future__ import annotations


class ParchGradError(Exception):
    """Base of all our errors; the message is one sentence: the thing, the expected, the found."""


class ModelError(ParchGradError):
    """A model package is missing, malformed or inconsistent."""


class WeightsError(ModelError):
    """A weights file cannot be read, fails its checksum or does not fit the architecture."""


class UnsupportedModelError(ModelError):
    """The network does something the engine cannot explain correctly."""


class TableError(ParchGradError):
    """A selection table is missing, malformed or belongs to another model."""


class DataError(ParchGradError):
    """The images a table is built from are missing, unreadable or wrongly labelled."""


class EvidenceError(ParchGradError):
    """Evidence that a table is built from cannot be read, or does not belong together."""


class ClassGraphError(ParchGradError):
    """A class graph is damaged, or belongs to another model or table."""


class NoClassGraphError(ClassGraphError):
    """No class graph was built for a table."""


class EvaluationError(ParchGradError):
    """An unfinished evaluation cannot be read or is another one."""


class WorkerError(ParchGradError):
    """A process or device that a build needs gave out."""


class InUseError(ParchGradError):
    """Another process is at work on the same table, or has changed it meanwhile."""


class ClusterError(ParchGradError):
    """A cluster cannot be reached, has no room, or failed; or Ray is not installed."""


class GoldenError(ParchGradError):
    """The golden record is missing, or the model no longer reproduces it."""


class MissingPackageError(ParchGradError, ImportError):
    """What was asked for needs a package that is not installed."""


# The extra of ours that brings a package.
_EXTRAS = {
    "networkx": "torch",
    "torch": "torch",
    "torchvision": "torch",
    "onnxruntime": "onnx",
    "onnx": "onnx",
    "onnxscript": "export",
    "onnx_ir": "export",
    "tritonclient": "export",
    "openvino": "openvino",
    "pytorch_grad_cam": "evaluate",
    "zennit": "evaluate",
    "captum": "attack",
    "pyarrow": "parquet",
}


def missing_package(what: str, error: ModuleNotFoundError) -> MissingPackageError | None:
    """The error that `what` needs the package it did not find; None where no extra of ours brings that package."""
    package = (error.name or "").partition(".")[0]
    if package not in _EXTRAS:
        return None
    return MissingPackageError(
        f"{what} needs {package}, which is not installed: pip install 'parchgrad[{_EXTRAS[package]}]'."
    )


class ExportError(ParchGradError):
    """An exported graph does not do what the model does, or an engine cannot run it."""


class OptionError(ParchGradError):
    """An explanation option is out of range.

    Attributes: `option` (its name), `value` (what was given), `allowed` (what would have been right).
    """

    def __init__(self, option: str, value: object, allowed: str) -> None:
        shown = repr(value)
        shown = shown if len(shown) <= 200 else f"{shown[:200]}..."
        super().__init__(f"Option '{option}' is {shown}; allowed: {allowed}.")
        self.option = option
        self.value = value
        self.allowed = allowed

    def __reduce__(self) -> tuple[type[OptionError], tuple[str, object, str]]:
        # From a worker process it comes as these three, not as its message.
        return type(self), (self.option, self.value, self.allowed)


class UnknownTargetError(OptionError):
    """A target is neither a class index nor a class name of the model."""


class UncoveredTargetError(ParchGradError):
    """A target is a class of the model for which the selection table has no row."""


class AbandonedError(ParchGradError):
    """An explanation was ended between two passes: its caller said that none of its images is wanted any more."""
