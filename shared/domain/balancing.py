"""The names of methods that balance tasks; apart, so that neither the API needs torch nor a child the API's checks."""

LOSS_METHODS = ("sum", "log_n", "uncertainty", "dwa")
GRADIENT_METHODS = {"pcgrad": "PCGrad", "upgrad": "UPGrad"}
"""Methods on gradients that have names of their own, with torchjd's."""
TORCHJD_PREFIX = "torchjd:"
TORCHJD_METHODS = ("AlignedMTL", "DualProj", "IMTLG", "MGDA", "Mean", "PCGrad", "Random", "Sum", "UPGrad")
"""Those of torchjd that follow from the gradients' products alone, need no solver beside SciPy's and remember nothing
between steps, as that would be lost in a checkpoint."""


def is_on_gradients(method: str) -> bool:
    """Say whether a method needs each task's own gradient."""
    return method in GRADIENT_METHODS or method.startswith(TORCHJD_PREFIX)
