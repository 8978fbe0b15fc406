"""A model may run on another GPU than the current one: its stream waits for the copies, not the current device's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cached_model import CachedModel
from places import Place
from tiny_models import VOCABULARY, make_model

from tierkv.config import CacheConfig
from tierkv.engine.models import LoadedModel
from tierkv.engine.runner import GenerationOptions, open_runner
from tierkv.movers.mover import CudaReady
from tierkv.values.block import Tier

SECOND = torch.device("cuda", 1)


class RecordedEvent:
    """Stands in for an event that was recorded on the second GPU."""

    device = SECOND

    def __init__(self) -> None:
        self.waiting: list[object] = []

    def wait(self, stream: object = None) -> None:
        self.waiting.append(stream or torch.cuda.current_stream())


def test_the_stream_that_waits_is_the_one_of_the_copies_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: device or torch.device("cuda", 0))
    events = [RecordedEvent(), RecordedEvent()]
    ready = CudaReady(events, [1, 2])  # type: ignore[arg-type]
    ready.wait(0)
    ready.wait()
    assert [event.waiting for event in events] == [[SECOND], [SECOND]]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_a_model_on_the_second_gpu_answers_as_without_a_cache(tmp_path: Path) -> None:
    model = make_model("llama", block_size=256, device="cuda:1", dtype=torch.bfloat16)
    prompt = [i % VOCABULARY for i in range(1000)]
    place = Place("cuda:1", torch.bfloat16, 256)
    with CachedModel(model, tmp_path / "a", block_size=256, hot=16, warm=8) as cached:
        cached.release(cached.start([prompt])[0])
        cached.cache.flush()
        cached.cache.evict(Tier.HOT)
        sequences, logits = cached.start([[*prompt, 5, 6, 7]])
        assert sequences[0].num_cached_tokens >= 768
        place.assert_logits(logits[0], model, [*prompt, 5, 6, 7], first=sequences[0].num_cached_tokens)
        cached.release(sequences)
    config = CacheConfig(cold_path=tmp_path / "b", hot_bytes=1 << 28, warm_bytes=1 << 28, min_free_bytes=0)
    with open_runner(LoadedModel(model, None, "m"), config) as runner:
        for start in range(4):  # the third is a replayed graph
            options = GenerationOptions(max_new_tokens=8, keep_logits=True)
            (found,) = runner.generate([[*prompt, start]], options)
            assert found.logits is not None
            place.assert_logits(found.logits, model, [*prompt, start, *found.token_ids[:-1]], first=len(prompt))
