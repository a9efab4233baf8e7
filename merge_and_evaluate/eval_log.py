"""What lm-eval and its libraries say while they score: all of it to a file, what matters to the screen as well."""

import logging
import re
import sys
from contextlib import contextmanager
from pathlib import Path

HARMLESS = (  # lm-eval warns of these whenever this script uses it as it is meant to be used
    "is not of type `str`",
    "overrides existing task",
    "is defined, but aggregation is not",
    "is defined, but higher_is_better is not",
    "Overwriting default num_fewshot of",  # the line before scoring shows the shots
    "generation_kwargs: ",
)


class _Once(logging.Filter):
    """Lets each warning of lm-eval's through once: thousands of documents may cause the same one."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def filter(self, record: logging.LogRecord) -> bool:
        text = re.sub(r"\d+", "#", record.getMessage())
        if not record.name.startswith("lm_eval") or text in self.seen or any(part in text for part in HARMLESS):
            return False
        self.seen.add(text)
        return True


def _handlers(path: Path) -> list[logging.Handler]:
    to_file = logging.FileHandler(path, mode="a", encoding="utf-8", delay=True)  # no file where nothing is said
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    to_screen = logging.StreamHandler(sys.stderr)
    to_screen.setLevel(logging.WARNING)
    to_screen.setFormatter(logging.Formatter("lm-eval: %(message)s"))
    to_screen.addFilter(_Once())
    return [to_file, to_screen]


@contextmanager
def logged_to(path: Path):
    """While this lasts, everything that is logged or warned of goes to `path` (appended), lm-eval's warnings to
    stderr as well, each once; of the progress bars only that of the requests is left."""
    root, before = logging.getLogger(), logging.getLogger().level
    path.parent.mkdir(parents=True, exist_ok=True)
    handlers = _handlers(path)
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        with _one_bar(), _transformers_in_the_log():
            yield
    finally:
        logging.captureWarnings(False)
        root.setLevel(before)
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()


@contextmanager
def _one_bar():
    """Without lm-eval's bars for every task's prompts (62 on the leaderboard) and for tokenizing, and the libraries'
    for files and maps. The bar of the requests, which knows the time left, is in another module and stays."""
    import datasets
    import lm_eval.api.model
    import lm_eval.api.task
    from transformers.utils import logging as of_transformers

    # In each module, since each took the name at its import.
    places = (lm_eval.api.task, lm_eval.api.model)
    bars = [place.tqdm for place in places]
    for place in places:
        place.tqdm = lambda items, **_: items
    datasets.disable_progress_bars()
    of_transformers.disable_progress_bar()
    try:
        yield
    finally:
        for place, bar in zip(places, bars, strict=True):
            place.tqdm = bar
        datasets.enable_progress_bars()
        of_transformers.enable_progress_bar()


@contextmanager
def _transformers_in_the_log():
    """transformers prints by a handler of its own and hands nothing on; here it hands on and does not print."""
    from transformers.utils import logging as of_transformers

    of_transformers.disable_default_handler()
    of_transformers.enable_propagation()
    try:
        yield
    finally:
        of_transformers.disable_propagation()
        of_transformers.enable_default_handler()
