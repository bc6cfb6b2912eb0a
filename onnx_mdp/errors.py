"""The exceptions that onnx-mdp raises, each with the exit code of the command line.

::

    MdpError                        1  base of all
     ├─ UsageError                  2  an argument is wrong
     ├─ UnreadableModelError        2  the file is not an ONNX model that can be loaded
     ├─ UnsupportedModelError       2  a valid model that onnx-mdp cannot prune, and why
     ├─ OutputError                 2  the result cannot be written
     ├─ MissingBackendError         3  a package or execution provider is not installed
     ├─ MeasurementError            1  the runtime could not measure a model
     ├─ SolverError                 1  a solver failed (infeasible is a status, not an error)
     └─ VerificationError           1  the pruned model differs from the masked original

A message is one sentence that says what is wrong, where, and what to do next. Expected
refusals (a frozen dimension, an infeasible target) are data with a reason, not exceptions.
"""

from __future__ import annotations

__all__ = [
    "MdpError",
    "MeasurementError",
    "MissingBackendError",
    "OutputError",
    "SolverError",
    "UnreadableModelError",
    "UnsupportedModelError",
    "UsageError",
    "VerificationError",
]


class MdpError(Exception):
    """Base of every error that onnx-mdp raises on purpose."""

    exit_code = 1


class UsageError(MdpError):
    """An argument or option is wrong."""

    exit_code = 2


class UnreadableModelError(MdpError):
    """The file is missing, is not ONNX, is truncated, or fails the safety checks."""

    exit_code = 2


class UnsupportedModelError(MdpError):
    """The model is valid ONNX, but of a kind that cannot be pruned (yet)."""

    exit_code = 2


class OutputError(MdpError):
    """The result cannot be written where it was asked for."""

    exit_code = 2


class MissingBackendError(MdpError):
    """A package or an execution provider is not installed; the message names the command."""

    exit_code = 3


class MeasurementError(MdpError):
    """The runtime could not load or time a model."""


class SolverError(MdpError):
    """A solver failed; an infeasible problem is a status and not this error."""


class VerificationError(MdpError):
    """The pruned model does not compute what the masked original computes."""
