"""The cost model against measured peaks, inside a worker: learn from a real run's probes, then predict shapes never seen.

Uses memsafe's inner parts, since what is judged is an inner part: predictions before the fact, for chosen micro-batches.
"""

from __future__ import annotations

import gc
import json
import random
from typing import Any

import numpy as np

from benchmarks import memory
from benchmarks.peers import Peer

__all__ = ["Prediction"]


class Prediction(Peer):
    """Option ``layout``: "packed", "padded" (with the small mask) or "padded, full mask"."""

    modules = ("torch", "sentence_transformers", "memsafe")

    def load(self, model: str, options: dict[str, Any]) -> None:
        self.model, self.layout = model, options["layout"]
        if self.layout != "packed":
            from memsafe.models import model as module
            from memsafe.models.selfcheck import SelfCheck

            check = SelfCheck(False, self.layout == "padded", "the benchmark asks for the padded path")
            vars(module)["run_self_check"] = lambda routes: routes.use(check) or check
        self.embedder = self._open({})

    def _open(self, memory_options: dict[str, Any]) -> Any:
        from memsafe import Embedder, MemoryPolicy

        return Embedder(self.model, device="cpu", memory=MemoryPolicy(learn=False, **memory_options))

    def errors(self, texts: str, shapes: int, seed: int, most_tokens: int) -> dict[str, Any]:
        """Run `texts` (the probes are part of that run, at most five), then measure `shapes` random micro-batches against the prediction.

        Lengths are heavy-tailed up to the model's maximum, sizes log-uniform up to `most_tokens` computed tokens. Nothing is
        learnt from what is measured here.
        """
        from memsafe.engine.sinks import to_host

        with open(texts, encoding="utf-8") as file:
            inputs = json.load(file)
        report = self.embedder.run(inputs).report
        engine = self.embedder._engine
        cost, device, loaded = engine.runners[0].tenant.ledger.cost, engine.model.device, engine.model
        pick, rows = random.Random(seed), []
        longest = min(self.embedder.max_length or 512, most_tokens)
        vocabulary = 30000
        for _ in range(shapes):
            batch = self._batch(pick, longest, most_tokens, vocabulary, loaded.packed)
            with device.measure(live=True) as peak:
                rows_out = to_host(loaded.forward(batch, {}))
            if not np.isfinite(rows_out).all():
                raise RuntimeError("a forward gave no numbers")
            rows.append(
                {
                    "tokens": batch.shape.tokens,
                    "sequences": batch.shape.sequences,
                    "longest": batch.shape.longest,
                    "live_bytes": peak.live_bytes,
                    "predicted_bytes": cost.predict(batch.shape),
                    "upper_bytes": cost.upper_bound(batch.shape),
                    "resident_bytes": peak.resident_bytes,
                    "resident_bound_bytes": cost.resident_bound(batch.shape),
                }
            )
            del rows_out
        probes = sum(o.live_bytes is not None for o in cost._observations)
        return {"path": report.path, "probes": probes, "observations": cost.num_observations, "shapes": rows}

    def _batch(self, pick: random.Random, longest: int, most_tokens: int, vocabulary: int, packed: bool) -> Any:
        from memsafe.planning.batch import MicroBatch, TokenizedInput

        goal = int(64 * (most_tokens / 64) ** pick.random())
        lengths: list[int] = []
        while True:
            length = min(int(8 * pick.paretovariate(0.9)), longest, max(goal, 8))
            grown = sorted([*lengths, length], reverse=True)
            computed = sum(grown) if packed else grown[0] * len(grown)
            if lengths and computed > goal:
                break
            lengths = grown
            if computed >= goal:
                break
        types = "token_type_ids" in self.embedder._engine.model.encoder.feature_names
        items = []
        for index, length in enumerate(lengths):
            ids = np.asarray([pick.randrange(1000, vocabulary) for _ in range(length)], dtype=np.int32)
            items.append(TokenizedInput(index, ids, np.zeros(length, dtype=np.int32) if types else None))
        return MicroBatch(tuple(items), packed)

    def limits(self, texts: str, trials: int, seed: int) -> list[dict[str, Any]]:
        """Load and run under random limits; the measured peak of the whole process must stay under each of them.

        Every trial begins after the previous one's memory has been given back, and counts from there.
        """
        from memsafe.machine.device import open_device

        with open(texts, encoding="utf-8") as file:
            inputs = json.load(file)
        weights = self.embedder._engine.model.weights_bytes
        self.embedder.close()
        device, pick, found = open_device("cpu"), random.Random(seed), []
        for _ in range(trials):
            gc.collect()
            device.release()
            limit = int(weights * 1.1 + (30 << 20) + pick.random() * (120 << 20))
            before = memory.resident_bytes()
            memory.reset_peak()
            embedder = self._open({"limit": limit, "knee": 0.0})  # micro-batches as large as the limit admits
            report = embedder.run(pick.sample(inputs, len(inputs) // 2)).report
            embedder.close()
            peak = memory.peak_bytes()
            beyond = None if peak is None or before is None else peak - before
            found.append(
                {
                    "limit_bytes": limit,
                    "peak_bytes": beyond,
                    "splits": report.splits,
                    "out_of_memory": report.out_of_memory,
                }
            )
        return found
