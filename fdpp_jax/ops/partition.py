"""How an op is partitioned over a mesh: by a rule with a factor for each axis of its operands and results.

On one device and within a fully manual `jax.shard_map` nothing is added to a program.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from fdpp_jax.ops import planned
from fdpp_jax.ops.planned import Function
from fdpp_jax.plans.device import Device

type Axes = tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Rule:
    """Factors of axes, as strings such as "b t (k g) h", where a query head is a key/value head and its place in it.

    Attributes:
      operands: Of each operand.
      results: Of each result.
      sizes: (factor, size) of the factors in parentheses.
      whole: Factors that are on every device whole.
      summed: The factor over which results are summed; each device sums its share.
    """

    operands: tuple[str, ...]
    results: tuple[str, ...]
    sizes: tuple[tuple[str, int], ...] = ()
    whole: tuple[str, ...] = ()
    summed: str | None = None

    @property
    def factors(self) -> tuple[str, ...]:
        """All factors, in the order in which they come up."""
        text = " ".join((*self.operands, *self.results))
        return tuple(dict.fromkeys(factor for term in _terms(text) for factor in term))

    def mapped(self, is_mapped: Sequence[bool]) -> "Rule":
        """The rule under vmap, with one more axis in front of mapped operands and of all results."""
        axis = f"map{sum(factor.startswith('map') for factor in self.factors)}"
        operands = [f"{axis} {x}" if m else x for x, m in zip(self.operands, is_mapped, strict=True)]
        return dataclasses.replace(self, operands=tuple(operands), results=tuple(f"{axis} {x}" for x in self.results))


def bind(function: Function, rule: Rule, device: Device, *operands: jax.Array) -> list[jax.Array]:
    """`planned.bind` that is partitioned by a rule: each device plans and computes its shard."""
    rest = _beside_manual_axes(jax.sharding.get_abstract_mesh())
    if rest is not None and rule.summed is not None:  # its axes have no names to sum over
        rule = dataclasses.replace(rule, summed=None, whole=(*rule.whole, rule.summed))

    @jax.custom_batching.custom_vmap
    def call(*operands: jax.Array) -> list[jax.Array]:
        outs: list[jax.Array] = _partitioned(function, rule, device, rest)(*operands)
        return outs

    @call.def_vmap
    def mapped(axis_size: int, is_mapped: list[bool], *operands: jax.Array) -> tuple[list[jax.Array], list[bool]]:
        del axis_size
        function_of_one = planned.Mapped(function, tuple(0 if m else None for m in is_mapped))
        outs = bind(function_of_one, rule.mapped(is_mapped), device, *operands)
        return outs, [True] * len(outs)

    found: list[jax.Array] = call(*operands)
    return found


@dataclasses.dataclass(frozen=True)
class _Summed:
    """A function whose operands are shares of a summed axis: results are added up over mesh axes in float32."""

    function: Any
    axes: tuple[str, ...]

    def __call__(self, device: Device | None, *operands: jax.Array) -> list[jax.Array]:
        sums = jax.lax.psum(self.function.partial()(device, *operands), self.axes)
        return [x.astype(dtype) for x, (_, dtype) in zip(sums, self.types(*operands), strict=True)]

    def types(self, *operands: Any) -> list[tuple[tuple[int, ...], Any]]:
        found: list[tuple[tuple[int, ...], Any]] = self.function.types(*operands)
        return found


def in_auto_axes(
    call: Callable[..., list[jax.Array]], specs: Callable[..., Sequence[Sequence[Any]]], operands: Sequence[Any]
) -> list[jax.Array]:
    """The call, in which axes that are explicit are automatic.

    Args:
      call: Of the operands.
      specs: specs(*specs) -> for each result what its axes are sharded over, from specs as long as the operands have
        axes.
      operands: Of the call.

    Returns:
      The results, of which an axis is sharded over what it asks for first and no axis before it has.
    """
    mesh = jax.typeof(operands[0]).sharding.mesh
    if not mesh.explicit_axes:
        return call(*operands)
    shardings = [
        NamedSharding(mesh, _without_repeats(spec)) for spec in specs(*(jax.typeof(x).sharding.spec for x in operands))
    ]
    explicit = jax.sharding.auto_axes(call, axes=mesh.explicit_axes, out_sharding=shardings)
    found: list[jax.Array] = explicit(*operands)
    return found


def _without_repeats(spec: Sequence[Any]) -> PartitionSpec:
    used: set[str] = set()
    entries: list[Axes] = []
    for entry in spec:
        names = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
        entries.append(tuple(name for name in names if name not in used) or None)
        used.update(names)
    return PartitionSpec(*entries)


def shares(*sizes: int) -> Iterator[tuple[int, ...]]:
    """What a device may have of axes of these sizes, each of which may be sharded; the whole axes come first."""
    mesh = jax.sharding.get_abstract_mesh()
    count = jax.device_count() if mesh.empty else mesh.size
    divisors = [i for i in range(1, count + 1) if count % i == 0]
    for ways in itertools.product(divisors, repeat=len(sizes)):
        if count % math.prod(ways) == 0 and not any(size % i for size, i in zip(sizes, ways, strict=True)):
            yield tuple(size // i for size, i in zip(sizes, ways, strict=True))


def _beside_manual_axes(mesh: AbstractMesh) -> AbstractMesh | None:
    """The axes that a `jax.shard_map` over some axes of a mesh leaves to the compiler; None where it leaves none."""
    rest = {name: size for name, size in mesh.shape.items() if name not in mesh.manual_axes}
    return AbstractMesh(tuple(rest.values()), tuple(rest)) if mesh.manual_axes and rest else None


@functools.cache
def _partitioned(function: Function, rule: Rule, device: Device, rest: AbstractMesh | None) -> Any:
    @custom_partitioning
    def call(*operands: jax.Array) -> list[jax.Array]:
        return planned.bind(function, device, *operands)

    def partition(mesh: jax.sharding.Mesh, operands: Any, results: Any) -> Any:
        # Beside manual axes, and without a mesh, XLA's own shardings come, of those axes alone.
        over = rest or (AbstractMesh((), ()) if mesh.empty else mesh)
        axes = _axes_of_factors(rule, over, operands, results)
        summed = axes.get(rule.summed or "")

        def shardings(texts: Sequence[str]) -> list[NamedSharding]:
            return [NamedSharding(over, _spec(text, axes)) for text in texts]

        def shard(*operands: jax.Array) -> list[jax.Array]:
            return planned.bind(_Summed(function, summed) if summed else function, device, *operands)

        return mesh, shard, shardings(rule.results), tuple(shardings(rule.operands))

    text = f"{', '.join(rule.operands)} -> {', '.join(rule.results)}"
    call.def_partition(
        partition,
        decode_shardings=rest is None,
        sharding_rule=text,
        need_replication_factors=tuple(factor for factor in rule.factors if factor in rule.whole),
        reduction_factors=() if rule.summed is None else (rule.summed,),
        **dict(rule.sizes),
    )
    return call


def _terms(text: str) -> list[list[str]]:
    """ "b (k g)" -> [["b"], ["k", "g"]]."""
    return [(pair or one).split() for pair, one in re.findall(r"\(([^)]*)\)|(\S+)", text)]


def _axes_of_factors(rule: Rule, mesh: Any, operands: Any, results: Any) -> dict[str, Axes]:
    """The mesh axes of each factor, as the results ask for them; of a sum's factor, as its operands lie."""
    axes: dict[str, Axes] = {}
    sizes = dict(rule.sizes)
    used: set[str] = set()
    everything = [*zip(rule.results, results, strict=True), *zip(rule.operands, operands, strict=True)]
    for text, x in everything:  # the size of each factor that has an axis of its own
        for term, size in zip(_terms(text), x.shape, strict=True):
            if len(term) == 1:
                sizes.setdefault(term[0], size)
    for text, x in everything:
        for term, names in zip(_terms(text), _names(x, mesh), strict=True):
            factor = term[0]  # of a pair the major one
            if factor in rule.whole or factor in axes:
                continue
            names = tuple(name for name in names if name not in used)
            while names and sizes[factor] % math.prod(mesh.shape[name] for name in names):
                names = names[:-1]
            if names:
                axes[factor] = names
                used.update(names)
    return axes


def _names(x: Any, mesh: Any) -> list[tuple[str, ...]]:
    """For each axis of an operand or a result the mesh axes that it is sharded over.

    XLA's own sharding has no names. Those of mesh axes of the sizes are taken: another choice is as right, as what is
    sharded otherwise is moved.
    """
    if isinstance(x.sharding, NamedSharding):
        spec = (*x.sharding.spec, *(None,) * (len(x.shape) - len(x.sharding.spec)))
        return [entry if isinstance(entry, tuple) else () if entry is None else (entry,) for entry in spec]
    try:
        shard = x.sharding.shard_shape(x.shape)
    except ValueError:  # a last shard is smaller
        return [()] * len(x.shape)
    found, left = [], dict(mesh.shape)
    for size, part in zip(x.shape, shard, strict=True):
        names: tuple[str, ...] = ()
        ways = size // part if part else 1
        for name, devices in tuple(left.items()):
            if devices > 1 and ways % devices == 0:
                ways //= left.pop(name)
                names = *names, name
        found.append(names)
    return found


def _spec(text: str, axes: Mapping[str, Axes]) -> PartitionSpec:
    return PartitionSpec(*(axes.get(term[0]) for term in _terms(text)))
