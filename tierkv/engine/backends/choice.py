"""Chooses an attention backend for each shape of layers in a batch."""

from __future__ import annotations

from collections.abc import Sequence

from tierkv.engine.backends.measured import AttentionTable, BatchSize
from tierkv.engine.backends.protocol import AttentionBackend, AttentionPlan, Batch, LayerShape
from tierkv.errors import ConfigError
from tierkv.values.layout import BlockLayout

__all__ = ["AttentionChoice"]


class AttentionChoice:
    """The backends of one device, and which of them attends what.

    backends: in the order of preference; the first that serves a batch does. faster: those that a table may prefer to
    the first. is_forced: the only backend must serve everything, or the call raises.
    num_layers: of the model. waits: wait for kernels that must be compiled, instead of using another backend
    meanwhile; ranks do, because all of them must run the same graphs.
    is_building: kernels are compiled in the background, and a batch was given another backend for that.
    """

    def __init__(
        self,
        backends: Sequence[AttentionBackend],
        *,
        faster: Sequence[AttentionBackend] = (),
        table: AttentionTable | None = None,
        num_layers: int = 1,
        is_forced: bool = False,
        waits: bool = False,
    ) -> None:
        self.backends: tuple[AttentionBackend, ...] = tuple(backends)
        self.is_forced = is_forced
        self._faster = {backend.name: backend for backend in faster}
        self._by_name = {backend.name: backend for backend in (*self.backends, *faster)}
        self._table = table
        # A model may have layers of two shapes, each with a plan of its own.
        self._layers_per_plan = max(1, num_layers // 2)
        self._waits = waits or is_forced
        self._building: set[tuple[str, LayerShape]] = set()

    @property
    def is_building(self) -> bool:
        """Whether a backend that would attend better is still being compiled. Ends compilations that have failed."""
        self._building = {
            (name, layer) for name, layer in self._building if not self._by_name[name].prepare(layer, wait=False)
        }
        return bool(self._building)

    def wait(self) -> None:
        """Wait for kernels that are compiled in the background."""
        for name, layer in tuple(self._building):
            self._by_name[name].prepare(layer, wait=True)

    def plan(self, layer: LayerShape, batch: Batch) -> AttentionPlan:
        """Plan a batch for layers of one shape. Raises as `choose` does."""
        return self.choose(layer, batch).plan(layer, batch)

    def choose(self, layer: LayerShape, batch: Batch) -> AttentionBackend:
        """Return the backend for a batch.

        Raises ConfigError if a forced backend does not serve it, and RuntimeError if none can be captured in
        a graph: then the pass runs eagerly.
        """
        plain = next((backend for backend in self.backends if self._serves(backend, layer, batch)), None)
        if plain is None:
            self._refuse(layer, batch)
        assert plain is not None
        if self._table is None or plain is not self.backends[0]:
            return plain
        names = self._table.faster(layer, BatchSize.of(batch), num_layers=self._layers_per_plan)
        preferred = (self._faster[name] for name in names if name in self._faster)
        return next((backend for backend in preferred if self._serves(backend, layer, batch)), plain)

    def can_capture(self, layout: BlockLayout, device: str) -> bool:
        """Return whether a backend that a CUDA graph can capture serves every layer of a layout."""
        layers = LayerShape.of_layout(layout, device)
        return any(
            all(backend.why_not(layer) is None for layer in layers)
            for backend in self.backends
            if backend.name != "torch"
        )

    def can_cascade(self, device: str) -> bool:
        """Return whether a shared prefix may be read together: flash-attn does that on "cuda", torch on "cpu"."""
        return not self.is_forced or self.backends[0].name == ("flash-attn" if device == "cuda" else "torch")

    def _serves(self, backend: AttentionBackend, layer: LayerShape, batch: Batch) -> bool:
        """Return whether a backend serves a batch now."""
        if backend.why_not(layer, batch) is not None:
            return False
        if not backend.prepare(layer, wait=self._waits):
            self._building.add((backend.name, layer))
            return False
        return backend.why_not(layer, batch) is None  # its kernels may have failed to compile

    def _refuse(self, layer: LayerShape, batch: Batch) -> None:
        reasons = "; ".join(f"{each.name}: {each.why_not(layer, batch)}" for each in self.backends)
        if self.is_forced:
            raise ConfigError(
                f"the attention backend that is forced does not serve this model ({reasons})",
                hint='"auto" takes another one where it must',
            )
        raise RuntimeError(f"no attention backend serves this batch ({reasons})")
