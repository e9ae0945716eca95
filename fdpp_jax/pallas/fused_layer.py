"""All matmuls of a decoder layer in one launch, from attention's output to the next layer's queries, keys and values.

Four products follow upon each other, each of the whole result of the one before, with what lies between them fused in:

    hidden += attended @ o^T
    inner = silu(g) * u,        g, u = norm(hidden) @ gate_up^T
    hidden += inner @ down^T
    query, key, value = norm(hidden) @ qkv^T, rotated; key and value go to their slots of the cache

A decode step is bound by reading the weights, so they must not stop coming. One CTA an SM runs through all products,
and its four warpgroups run on their own:

- weights: streams tiles through a ring of TMA stages that knows no end of a product: while the grid waits for the last
  results of one product, the ring fills with weights of the next.
- inputs: loads x, chunk by chunk, as soon as the grid has counted all results that make up the chunk (grid_sync).
- products: y^T [64, rows] += w [64, block_k] @ x^T [block_k, rows], rows padded to 8, with the weights as the large
  operand (as in flat_matmul). A unit of WIDTH columns, over all of K, is one CTA's, but for those that fill no round
  (layer_phases). Gate and up, and the halves of a head that rotate together, are one unit with its partner columns.
- results: what becomes of a unit's product, until it is stored and counted. That takes longer than a tile's product,
  since stores and counts queue up behind the loads of weights; the next unit's products go on meanwhile.

RMSNorm needs no pass of its own: whoever finishes columns of hidden stores them times the norm's weight, too, and their
sum of squares; 1 / rms is a factor of a whole row, which the next product applies to its result.

Source: FlashDecoding++ (arXiv 2311.01282), section 4 (flat GEMM with double buffering), across products.
"""

import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fdpp_jax.config import FusedLayerConfig, round_up
from fdpp_jax.pallas import accumulators, grid_sync, ring
from fdpp_jax.pallas.accumulators import HEIGHT, LAYOUT, WIDTH
from fdpp_jax.pallas.layer_phases import Facts, Phase, Segment, Step


class LayerWeights(NamedTuple):
    """bfloat16; matrices are [out, in].

    Attributes:
      o: [D, N * H].
      post_norm: [D], of the norm before the MLP.
      gate_up: [2 * F, D].
      down: [D, F].
      next_norm: [D], of the next layer's first norm; None after the last layer.
      next_qkv: [(N + 2 K) * H, D], of the next layer; None after the last layer.
      next_bias: [(N + 2 K) * H], of the next layer's queries, keys and values, if it has one.
    """

    o: jax.Array
    post_norm: jax.Array
    gate_up: jax.Array
    down: jax.Array
    next_norm: jax.Array | None = None
    next_qkv: jax.Array | None = None
    next_bias: jax.Array | None = None


class NextLayer(NamedTuple):
    """What the next layer's attention reads: query [B, N, H], and the cache [B, S, K, H] with the new token in it."""

    query: jax.Array
    keys: jax.Array
    values: jax.Array


class Counters(NamedTuple):
    """What the grid counts.

    Attributes:
      results: A row for each of the products that another reads: units that are done of each chunk.
      guests: A row for each product: guests that are done of each unit that is split.
    """

    results: jax.Array
    guests: jax.Array


def counters_for(max_depth: int, config: FusedLayerConfig) -> Counters:
    """Counters at zero, for products with up to max_depth columns of x."""
    results = grid_sync.counters(3, pl.cdiv(max_depth, config.chunk))
    return Counters(results, grid_sync.counters(4, config.num_ctas))


# Jitted so that a model's layers share one trace and one lowering: a kernel takes some 0.3 s to lower.
@functools.partial(jax.jit, static_argnames=("eps", "config", "interpret"))
def fused_layer(
    attended: jax.Array,
    hidden: jax.Array,
    weights: LayerWeights,
    cos: jax.Array,
    sin: jax.Array,
    keys: jax.Array | None,
    values: jax.Array | None,
    lengths: jax.Array,
    counters: Counters,
    *,
    eps: float,
    config: FusedLayerConfig,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[jax.Array, NextLayer | None, Counters]:
    """A layer after its attention, and the next layer up to its own.

    Args:
      attended: [B, N, H] bfloat16, attention's output.
      hidden: [B, D] bfloat16, the residual stream before the layer.
      weights: Of this layer and the next.
      cos: [B, H / 2] float32, of the rotary angles of the tokens' positions.
      sin: As cos.
      keys: [B, S, K, H] bfloat16, of the next layer; donated. None after the last layer.
      values: As keys.
      lengths: [B] int32, the slot that each row's new key and value go to; one beyond S goes nowhere.
      counters: counters_for(max(N * H, D, F), config), then those that the last layer returned.
      eps: Of both norms.
      config: Tiles and stages.
      interpret: Runs the kernel interpreted on the CPU, a launch a step: it runs one CTA after the other.

    Returns:
      hidden [B, D] after the layer, what the next layer's attention reads (None after the last layer), and counters.
    """
    batch, num_heads, head_dim = attended.shape
    hidden_size, inner_size = hidden.shape[1], weights.down.shape[1]
    capacity, num_kv_heads = (0, 0) if keys is None else keys.shape[1:3]
    facts = Facts(
        num_rows=round_up(batch, 8),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        hidden_size=hidden_size,
        inner_size=inner_size,
        eps=eps,
        config=config,
        is_interpreted=interpret is not None,
    )
    x_rows = batch if batch <= 8 else facts.num_rows  # TMA reads fewer rows than a tile has, or whole tiles
    inputs = dict(
        attended=jnp.pad(attended.reshape(batch, -1), ((0, x_rows - batch), (0, 0))), hidden=hidden, cos=cos, sin=sin,
        slots=jnp.where(lengths < capacity, jnp.arange(batch) * capacity + lengths, batch * capacity).astype(jnp.int32),
        **{name: weight for name, weight in weights._asdict().items() if weight is not None},
    )  # fmt: skip
    rows = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    x = rows((x_rows, hidden_size))
    squares = jax.ShapeDtypeStruct((round_up(2 * hidden_size // WIDTH, HEIGHT), facts.num_rows), jnp.float32)
    outputs: dict[str, Any] = dict(
        middle=rows(hidden.shape), scaled_middle=x, middle_squares=squares,
        inner=rows((x_rows, inner_size)), last=rows(hidden.shape),
        parts=jax.ShapeDtypeStruct((len(facts.phases), config.num_ctas, HEIGHT * facts.num_rows), jnp.float32),
    )  # fmt: skip
    state: dict[str, Any] = counters._asdict()
    if keys is not None:
        assert values is not None
        outputs |= dict(scaled_last=x, last_squares=squares, query=rows((batch, num_heads * head_dim)))
        flat = batch * capacity, num_kv_heads * head_dim
        state |= dict(keys=keys.reshape(flat), values=values.reshape(flat))
    results = _run(outputs, state, inputs=inputs, facts=facts, interpret=interpret)
    counters = Counters(results["results"], results["guests"])
    if keys is None:
        return results["last"], None, counters
    query = results["query"].reshape(attended.shape)
    next_layer = NextLayer(query, results["keys"].reshape(keys.shape), results["values"].reshape(keys.shape))
    return results["last"], next_layer, counters


def _run(
    outputs: dict[str, Any],
    state: dict[str, Any],
    *,
    inputs: dict[str, Any],
    facts: Facts,
    interpret: plgpu.InterpretGPUParams | None,
) -> dict[str, jax.Array]:
    """outputs and state, which the kernel updates in place, by name."""
    refs = {name: jax.new_ref(x) for name, x in state.items()}
    if interpret is None:
        results = _launch(facts, facts.steps, inputs, refs, outputs, interpret)
    else:  # memory that nobody has written is NaN
        made = {name: jax.new_ref(jnp.full(x.shape, jnp.nan, x.dtype)) for name, x in outputs.items()}
        for step in facts.steps:
            _launch(facts, (step,), inputs, refs | made, {}, interpret)
        results = {name: jax.freeze(ref) for name, ref in made.items()}
    return results | {name: jax.freeze(ref) for name, ref in refs.items()}


def _launch(
    facts: Facts,
    steps: tuple[Step, ...],
    inputs: dict[str, Any],
    refs: dict[str, Any],
    outputs: dict[str, Any],
    interpret: plgpu.InterpretGPUParams | None,
) -> dict[str, jax.Array]:
    config, num_rows, bf16, f32 = facts.config, facts.num_rows, jnp.bfloat16, jnp.float32
    transforms = ring.tile_transforms(config.block_k)
    operands = inputs | refs
    barriers = dict(
        w_ready=plgpu.Barrier(num_arrivals=2, num_barriers=config.num_stages),
        w_free=plgpu.Barrier(num_barriers=config.num_stages),
        x_ready=plgpu.Barrier(num_arrivals=config.num_x_tiles, num_barriers=config.num_x_stages),
        x_free=plgpu.Barrier(num_barriers=config.num_x_stages),
        y_ready=plgpu.Barrier(),
        y_free=plgpu.Barrier(),
    )
    x_shape = config.num_x_stages, config.num_x_tiles, num_rows, config.block_k

    def body(*args: Any, **smem: Any) -> None:
        gmem = types.SimpleNamespace(**dict(zip((*operands, *outputs), args, strict=True)))
        cta = _Cta(gmem, types.SimpleNamespace(**smem), facts, steps)
        group = lax.axis_index("warpgroup")
        for i, work in enumerate((cta.multiply, cta.stream_weights, cta.stream_inputs, cta.finish)):
            pl.when(group == i)(work)

    results = plgpu.kernel(
        body,
        out_type=list(outputs.values()),
        scratch_types=dict(
            w=plgpu.SMEM((config.num_stages, HEIGHT, config.block_k), bf16, transforms=transforms),
            x=plgpu.SMEM(x_shape, bf16, transforms=transforms),
            y=plgpu.SMEM((HEIGHT * num_rows,), f32),
            **barriers,
        ),
        grid=(config.num_ctas,),
        grid_names=("cta",),
        num_threads=4,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name="fused_layer",
    )(*operands.values())
    return dict(zip(outputs, results, strict=True))


class _Cta:
    """One CTA's work; see the module."""

    def __init__(self, gmem: Any, smem: Any, facts: Facts, steps: tuple[Step, ...]):
        self.gmem, self.smem, self.facts, self.steps = gmem, smem, facts, steps
        self.cta = lax.axis_index("cta")
        self.is_whole = len(steps) > 1

    def _for_segments(self, step: Step, work: Callable[..., Any], carry: Any) -> Any:
        """carry = work(turn, segment, carry) for all segments of a step, empty ones included."""

        def body(turn: jax.Array, carry: Any) -> Any:
            return work(turn, self.facts.segment(step, self.cta, turn), carry)

        return lax.fori_loop(0, self.facts.num_segments(step, self.cta), body, carry)

    # Warpgroup 1

    def stream_weights(self) -> None:
        num_stages, block_k, smem = self.facts.config.num_stages, self.facts.config.block_k, self.smem
        done = jnp.int32(0)
        for step in self.steps:
            source = getattr(self.gmem, step.phase.w)
            height = WIDTH // 2 if step.phase.kind == "residual" else WIDTH

            def stream(_: Any, segment: Segment, done: jax.Array, step=step, source=source, height=height) -> jax.Array:
                def tile(k: jax.Array, done: jax.Array) -> jax.Array:
                    slot = lax.rem(done, jnp.int32(num_stages))
                    pl.when(done >= num_stages)(lambda: plgpu.barrier_wait(smem.w_free.at[slot]))
                    for half, row in enumerate(self.facts.columns(step.phase, segment.unit)):
                        part = source.at[pl.ds(row, height), pl.ds(k * block_k, block_k)]
                        target = smem.w.at[slot, pl.ds(half * height, height)]
                        plgpu.copy_gmem_to_smem(part, target, smem.w_ready.at[slot])
                    return done + 1

                return lax.fori_loop(segment.start, segment.stop, tile, done)

            done = self._for_segments(step, stream, done)
        _drain(smem.w_free, done, num_stages)

    # Warpgroup 2

    def stream_inputs(self) -> None:
        chunks_done = jnp.int32(0)
        for step in self.steps:

            def stream(turn: jax.Array, segment: Segment, done: jax.Array, step=step) -> jax.Array:
                load = functools.partial(self._load_chunk, step, turn)
                return lax.fori_loop(*self._chunks(segment), load, done)

            chunks_done = self._for_segments(step, stream, chunks_done)
        _drain(self.smem.x_free, chunks_done, self.facts.config.num_x_stages)

    def _chunks(self, segment: Segment) -> tuple[jax.Array, jax.Array]:
        """The chunks of x [first, last) that a segment reads."""
        first = lax.div(segment.start, jnp.int32(self.facts.config.num_x_tiles))
        last = self.facts.num_chunks(segment.stop)
        return first, jnp.where(segment.stop > segment.start, last, first)

    def _load_chunk(self, step: Step, turn: jax.Array, chunk: jax.Array, chunks_done: jax.Array) -> jax.Array:
        """Loads a chunk of x once it is complete."""
        facts, config, gmem, smem = self.facts, self.facts.config, self.gmem, self.smem
        slot = lax.rem(chunks_done, jnp.int32(config.num_x_stages))
        pl.when(chunks_done >= config.num_x_stages)(lambda: plgpu.barrier_wait(smem.x_free.at[slot]))
        if self.is_whole and step.index > 0:
            counter = gmem.results.at[step.index - 1, chunk]
            num_parts = lax.div(jnp.minimum(step.phase.depth - chunk * config.chunk, config.chunk), jnp.int32(WIDTH))
            is_new = turn <= (1 if facts.num_split(step.phase) else 0)  # a whole unit has seen all chunks
            pl.when(is_new)(lambda: grid_sync.await_count(counter, num_parts))
        for i in range(config.num_x_tiles):
            # Rows and columns beyond the array's come as zeros, which takes a traced start.
            columns = pl.ds(chunk * config.chunk + i * config.block_k, config.block_k)
            source = getattr(gmem, step.phase.x).at[pl.ds(self.cta * 0, facts.num_rows), columns]
            plgpu.copy_gmem_to_smem(source, smem.x.at[slot, i], smem.x_ready.at[slot])
        return chunks_done + 1

    # Warpgroup 0

    def multiply(self) -> None:
        done = jnp.int32(0), jnp.int32(0), jnp.int32(0)
        for step in self.steps:
            done = self._for_segments(step, self._multiply, done)
        pl.when(done[-1] > 0)(lambda: plgpu.barrier_wait(self.smem.y_free))

    def _multiply(self, _: jax.Array, segment: Segment, done: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        smem, facts = self.smem, self.facts
        tiles_done, chunks_done, products_done = done
        num_tiles = segment.stop - segment.start
        first_chunk, last_chunk = self._chunks(segment)

        @pl.when(num_tiles > 0)
        def _multiply() -> None:
            product = functools.partial(self._product, segment, tiles_done, chunks_done)
            y = pl.run_scoped(product, plgpu.ACC((HEIGHT, facts.num_rows), jnp.float32))
            pl.when(products_done > 0)(lambda: plgpu.barrier_wait(smem.y_free))
            accumulators.leave(y, smem.y, is_interpreted=facts.is_interpreted)
            plgpu.barrier_arrive(smem.y_ready)

        is_product = (num_tiles > 0).astype(jnp.int32)
        return tiles_done + num_tiles, chunks_done + last_chunk - first_chunk, products_done + is_product

    def _product(self, segment: Segment, tiles_done: jax.Array, chunks_done: jax.Array, acc: Any) -> jax.Array:
        config, smem = self.facts.config, self.smem
        num_x_tiles = jnp.int32(config.num_x_tiles)
        first_chunk, _ = self._chunks(segment)

        def chunk_of(k: jax.Array) -> jax.Array:
            return chunks_done + lax.div(k, num_x_tiles) - first_chunk

        def release(k: jax.Array, is_end: jax.Array) -> None:
            """What the product with tile k has read; its chunk, too, if that was its last one."""
            tile = tiles_done + k - segment.start
            plgpu.barrier_arrive(smem.w_free.at[lax.rem(tile, jnp.int32(config.num_stages))])
            x_free = smem.x_free.at[lax.rem(chunk_of(k), jnp.int32(config.num_x_stages))]
            pl.when(is_end)(lambda: plgpu.barrier_arrive(x_free))

        def multiply(k: jax.Array, _: None) -> None:
            i, tile = lax.rem(k, num_x_tiles), tiles_done + k - segment.start
            slot = lax.rem(tile, jnp.int32(config.num_stages))
            x_slot = lax.rem(chunk_of(k), jnp.int32(config.num_x_stages))
            is_first = k == segment.start
            pl.when((i == 0) | is_first)(lambda: plgpu.barrier_wait(smem.x_ready.at[x_slot]))
            plgpu.barrier_wait(smem.w_ready.at[slot])
            plgpu.wgmma(acc, smem.w.at[slot], smem.x.at[x_slot, i].transpose((1, 0)))
            plgpu.wgmma_wait(1)
            pl.when(jnp.logical_not(is_first))(lambda: release(k - 1, i == 0))

        lax.fori_loop(segment.start, segment.stop, multiply, None)
        y = acc[...]
        release(segment.stop - 1, segment.stop > 0)
        return y

    # Warpgroup 3

    def finish(self) -> None:
        results = self.gmem.results
        if self.is_whole:  # what earlier launches left: none counts there before CTA 0 has counted its first unit
            for i in range(1, results.shape[0]):
                pl.when(self.cta == 0)(functools.partial(grid_sync.clear, results.at[i]))
        for step in self.steps:
            if step.is_guests:
                self._for_segments(step, functools.partial(self._leave, step), None)
                continue
            factor = None
            if step.phase.kind != "residual":
                factor = self._factor(step)
            self._for_segments(step, functools.partial(self._finish, step, factor), None)
            if self.is_whole and step.index == 1:  # all CTAs have a whole unit of it, for which they saw all of row 0
                pl.when(self.cta == 0)(self._clear_first_row)

    def _clear_first_row(self) -> None:
        self._await_all(self.facts.phases[2], 1)
        grid_sync.clear(self.gmem.results.at[0])

    def _await_all(self, phase: Phase, row: int) -> None:
        """Waits for all that a phase reads."""
        grid_sync.await_row(self.gmem.results.at[row], phase.depth // WIDTH, self.facts.config.chunk // WIDTH)

    def _factor(self, step: Step) -> jax.Array:
        """1 / rms of every row [rows]."""
        if self.is_whole:
            self._await_all(step.phase, step.index - 1)
        facts = self.facts
        sums = self.gmem.middle_squares if step.phase.kind == "gate" else self.gmem.last_squares
        squares = plgpu.load(sums, layout=LAYOUT, optimized=False)
        is_sum = plgpu.broadcasted_iota(jnp.int32, squares.shape, 0, layout=LAYOUT) < 2 * facts.hidden_size // WIDTH
        mean = jnp.where(is_sum, squares, 0.0).sum(axis=0) / facts.hidden_size
        return lax.rsqrt(mean + facts.eps)

    def _take(self, is_alone: bool) -> tuple[jax.Array, ...]:
        """A product [64, rows], and unless it is alone with its halves changed for each other, too."""
        take = functools.partial(accumulators.left, self.smem.y, self.facts.num_rows)
        plgpu.barrier_wait(self.smem.y_ready)
        ys = tuple(
            take(is_partner=is_partner, is_interpreted=self.facts.is_interpreted)
            for is_partner in ((False,) if is_alone else (False, True))
        )
        plgpu.barrier_arrive(self.smem.y_free)
        return ys

    def _leave(self, step: Step, _: jax.Array, segment: Segment, __: None) -> None:
        """As a guest, with the host."""

        @pl.when(segment.stop > segment.start)
        def _leave() -> None:
            (y,) = self._take(is_alone=True)
            target = self.gmem.parts.at[step.index, self.cta]
            accumulators.leave(y, target, is_interpreted=self.facts.is_interpreted)
            if self.is_whole:
                grid_sync.count(self.gmem.guests.at[step.index, segment.unit])

    def _finish(self, step: Step, factor: jax.Array | None, turn: jax.Array, segment: Segment, _: None) -> None:
        facts, phase = self.facts, step.phase

        @pl.when(segment.stop > segment.start)
        def _finish() -> None:
            finish = getattr(self, f"_{phase.kind}")(step.index, segment.unit, *facts.columns(phase, segment.unit))
            ys = self._take(is_alone=factor is None)
            if facts.num_split(phase):
                num_guests = jnp.where(turn == 0, facts.num_guests(phase, self.cta, segment.unit), 0)
                ys = self._with_guests(step, segment.unit, num_guests, ys)
            if factor is not None:
                # Rounded as a matmul of its own would leave it.
                ys = tuple(y * lax.broadcast_in_dim(factor, y.shape, [1]) for y in ys)
                ys = tuple(y.astype(jnp.bfloat16).astype(jnp.float32) for y in ys)
            finish(*ys)

    def _with_guests(
        self, step: Step, unit: jax.Array, num_guests: jax.Array, ys: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, ...]:
        """With what the guests have left, always in the same order."""
        if self.is_whole:
            row = self.gmem.guests.at[step.index, pl.ds(unit, 1)]

            @pl.when(num_guests > 0)
            def _await_guests() -> None:
                grid_sync.await_count(row.at[0], num_guests)
                grid_sync.clear(row)  # nobody else waits for it

        def add(i: jax.Array, ys: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            take = functools.partial(
                accumulators.left, self.gmem.parts.at[step.index, self.cta + 1 + i], self.facts.num_rows
            )
            parts = (take(is_partner=p, is_interpreted=self.facts.is_interpreted) for p in (False, True))
            return tuple(y + part for y, part in zip(ys, parts, strict=False))

        return lax.fori_loop(0, num_guests, add, ys)

    # For a unit's product y [64, rows], and its partner's: what can be loaded before is.

    def _count(self, index: int, column: jax.Array) -> None:
        """For those who wait for the chunk of this product's result that the column is in."""
        if self.is_whole and index + 1 < len(self.facts.phases):
            grid_sync.count(self.gmem.results.at[index, lax.div(column, jnp.int32(self.facts.config.chunk))])

    def _residual(self, index: int, unit: jax.Array, low: jax.Array, high: jax.Array) -> Any:
        del high
        gmem, facts = self.gmem, self.facts
        name, before, norm = ("middle", "hidden", "post_norm") if index == 0 else ("last", "middle", "next_norm")
        load = functools.partial(
            accumulators.load, column=low, num_rows=facts.num_rows, is_interpreted=facts.is_interpreted
        )
        # For the factor of gate and up this warpgroup has seen the counts of all of `middle`.
        hidden = load(getattr(gmem, before))
        gain = load(getattr(gmem, norm)) if hasattr(gmem, norm) else None

        def finish(y: jax.Array) -> None:
            total = (hidden + y).astype(jnp.bfloat16).astype(jnp.float32)
            self._store(total, name, low)
            if gain is not None:
                self._store(total * gain, f"scaled_{name}", low)
                sums = getattr(gmem, f"{name}_squares").at[pl.ds(2 * unit, 2)]
                accumulators.store_squares(total, sums, is_interpreted=facts.is_interpreted)
            self._count(index, low)

        return finish

    def _gate(self, index: int, unit: jax.Array, low: jax.Array, high: jax.Array) -> Any:
        del unit, high

        def finish(gate: jax.Array, up: jax.Array) -> None:
            self._store(gate / (1.0 + jnp.exp(-gate)) * up, "inner", low)
            self._count(index, low)

        return finish

    def _qkv(self, index: int, unit: jax.Array, low: jax.Array, high: jax.Array) -> Any:
        del index, unit
        gmem, facts = self.gmem, self.facts
        load = functools.partial(accumulators.load, num_rows=facts.num_rows, is_interpreted=facts.is_interpreted)
        angle = lax.rem(low, jnp.int32(facts.head_dim))
        cos, sin = load(gmem.cos, angle), load(gmem.sin, angle)
        biases = [load(gmem.next_bias, column) for column in (low, high)] if hasattr(gmem, "next_bias") else []
        key, value = facts.num_heads * facts.head_dim, (facts.num_heads + facts.num_kv_heads) * facts.head_dim

        def finish(y: jax.Array, partner: jax.Array) -> None:
            if biases:
                y, partner = (
                    (x + bias).astype(jnp.bfloat16).astype(jnp.float32)
                    for x, bias in zip((y, partner), biases, strict=True)
                )
            is_turned = (low < value).astype(jnp.float32)
            c, s = cos * is_turned + (1.0 - is_turned), sin * is_turned
            turned = y * c - partner * s, partner * c + y * s
            for name, start, end in (("query", 0, key), ("keys", key, value), ("values", value, None)):
                is_here = low >= start if end is None else (low >= start) & (low < end)
                slots = None if name == "query" else gmem.slots
                for part, column in zip(turned, (low, high), strict=True):
                    pl.when(is_here)(functools.partial(self._store, part, name, column - start, slots))

        return finish

    def _store(self, y: jax.Array, name: str, column: jax.Array, rows_gmem: Any = None) -> None:
        target, is_interpreted = getattr(self.gmem, name), self.facts.is_interpreted
        accumulators.store(y, target, column, is_interpreted=is_interpreted, rows_gmem=rows_gmem)


def _drain(free: Any, done: jax.Array, num_stages: int) -> None:
    """Waits until all that was loaded has been read: a barrier may not go while an arrival is on its way."""
    for i in range(num_stages):
        item = done - num_stages + i
        slot = lax.rem(item, jnp.int32(num_stages))
        pl.when(item >= 0)(functools.partial(plgpu.barrier_wait, free.at[slot]))
