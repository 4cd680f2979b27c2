"""What an operator sees of pruning on vLLM's ``/metrics``, in Prometheus' format.

Requests are counted in the front end, selections in the first worker. A scrape reaches another process's numbers only
through the folder that ``PROMETHEUS_MULTIPROC_DIR`` names when the server starts: without it the workers' rows are
missing.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from prometheus_client import Counter, Gauge, Histogram

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
REMEMBERED_PICTURES = 65536

BEFORE = Counter(
    "script_visual_tokens_before", "Visual tokens that pictures would give unpruned.", ["model", "method"]
)
AFTER = Counter("script_visual_tokens_after", "Visual tokens that the language model is given.", ["model", "method"])
REFUSALS = Counter("script_refusals", "Requests answered 400 by pruning, by what was wrong.", ["model", "reason"])
PREPARED = Counter(
    "script_preprocessed_pictures", "Pictures, and whether vLLM's cache had their pixels.", ["model", "cache"]
)
SELECTION = Histogram(
    "script_selection_seconds", "Seconds for the pictures of a step.", ["model", "method"], buckets=SECONDS
)
PICTURES = Counter("script_selected_pictures", "Pictures that tokens were chosen of.", ["model", "method"])
FEATURES = Counter("script_feature_cache_lookups", "Unpruned features that were looked for.", ["model", "result"])
FEATURE_BYTES = Gauge(
    "script_feature_cache_bytes", "Bytes of unpruned features.", ["model"], multiprocess_mode="livesum"
)


class FrontEndMetrics:
    """What one front end counts.

    Args:
        model: the name that the server gives the model.
    """

    def __init__(self, model: str) -> None:
        self.model = model
        self._before: OrderedDict[str, int] = OrderedDict()

    def refused(self, reason: str) -> None:
        REFUSALS.labels(self.model, reason).inc()

    def prepared(self, hits: int, misses: int) -> None:
        PREPARED.labels(self.model, "hit").inc(hits)
        PREPARED.labels(self.model, "miss").inc(misses)

    def note_unpruned(self, picture: str, tokens: int) -> None:
        """Remember how many tokens a picture would give: vLLM's cache holds what was counted for its last request."""
        self._before[picture] = tokens
        self._before.move_to_end(picture)
        if len(self._before) > REMEMBERED_PICTURES:
            self._before.popitem(last=False)

    def laid_out(self, picture: str, method: str, tokens: int) -> None:
        """A picture stands in a prompt with so many tokens; not counted where its unpruned number was forgotten."""
        before = self._before.get(picture)
        if before is not None:
            BEFORE.labels(self.model, method).inc(before)
            AFTER.labels(self.model, method).inc(tokens)


class WorkerMetrics:
    """What the first worker of a replica counts; the others count nothing.

    Args:
        model: the name that the server gives the model.
        counts: whether this is the first.
    """

    def __init__(self, model: str, counts: bool) -> None:
        self.model, self.counts = model, counts

    @contextmanager
    def selecting(self, methods: Sequence[str]) -> Iterator[None]:
        """Time the choice for a step's pictures, one method each. On a GPU: until it is queued, not done."""
        start = time.perf_counter()
        yield
        if not self.counts or not methods:
            return
        first = methods[0] if len(set(methods)) == 1 else "several"
        SELECTION.labels(self.model, first).observe(time.perf_counter() - start)
        for method in methods:
            PICTURES.labels(self.model, method).inc()

    def looked_up(self, hits: int, misses: int, nbytes: int) -> None:
        if self.counts:
            FEATURES.labels(self.model, "hit").inc(hits)
            FEATURES.labels(self.model, "miss").inc(misses)
            FEATURE_BYTES.labels(self.model).set(nbytes)
