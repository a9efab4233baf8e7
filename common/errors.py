"""The one exception that users see."""


class DataError(Exception):
    """Bad data or a bad environment. Its text is the one line that the user reads.

    The line names the tensor or file, says what was found, what was needed, and what to do:
    "tensor 'lm_head.weight' is [32002, 4096] in ft but [32000, 4096] in base; ...".
    """


def reason_of(error: BaseException) -> str:
    """A library's reason in one line. No script here has the trust_remote_code that it may ask for."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if "trust_remote_code" in reason:
        return (
            "it names code of its own (auto_map), which is never run, and transformers cannot read it without that "
            "code; take a version of the model that transformers knows"
        )
    return reason
