"""How much the hostile suite does: a short run by default, the whole one with HOSTILE=whole (`make hostile`)."""

import os

WHOLE = os.environ.get("HOSTILE") == "whole"


def amount(short, whole):
    """The one of the two that this run uses."""
    return whole if WHOLE else short
