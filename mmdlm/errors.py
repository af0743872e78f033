"""The one error a person can mend."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input from a person: the message is one sentence: what, got, expected, how to mend.

    The command line prints it and exits with code 2; everything else keeps its traceback.
    """
