"""The one exception that users see."""


class DataError(Exception):
    """Bad data or a bad environment. Its text is the one line that the user reads.

    The line names the tensor or file, says what was found, what was needed, and what to do:
    "tensor 'lm_head.weight' is [32002, 4096] in ft but [32000, 4096] in base; ...".
    """
