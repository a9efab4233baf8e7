"""The control's score, called by lm-eval: of each paragraph, how many bits per byte the model needs to foretell it."""

import math


def bits_a_byte(doc: dict, results: list[float]) -> dict[str, float]:
    """({"text": "ab"}, [log-likelihood in nats]) -> {"bits_a_byte": …}: -8 nats over 2 bytes are 5.77. Less is
    better.
    """
    (log_likelihood,) = results
    return {"bits_a_byte": -log_likelihood / (math.log(2) * len(doc["text"].encode()))}
