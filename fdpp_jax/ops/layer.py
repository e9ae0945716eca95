"""What lies between two attentions of a decode step, for layers that a backend fuses: plan and run.

A model without such a plan calls its own modules, whose matmuls are `flat_matmul`.
"""

from typing import Any

import jax

from fdpp_jax import heuristics
from fdpp_jax.ops.running import module_of
from fdpp_jax.plans import device
from fdpp_jax.plans.backend import LayerPlan
from fdpp_jax.plans.calls import HeadWeights, LayerCache, LayerWeights, NextAttention
from fdpp_jax.plans.shapes import LayerShape


def plan_layer(shape: LayerShape) -> LayerPlan:
    """The plan for the device of `target`, else for the one that JAX runs on now."""
    return heuristics.plan_layer(shape, device.planned())


def compiler_options(plan: LayerPlan) -> dict[str, str | bool]:
    """XLA's options for a loop of decode steps with such layers.

    Launches that overlap do not where XLA records them as CUDA graphs, each as one of its own. Many small launches,
    of an unfused step or of fused layers that are several, are better off as one graph, which a kernel that takes a
    slice of an array, as a query is of queries and keys, breaks where XLA calls it with the place of the slice
    instead of a copy.
    """
    if plan.overlaps_attention:
        return {"xla_gpu_enable_command_buffer": ""}
    return {"xla_gpu_enable_dynamic_slice_fusion": False}


class FusedLayers:
    """The fused layers of one decode step, in their order; what one launch leaves for the next stays in here.

    Args:
      shape: Of the layers.
      plan: A fused one.
      options: Of the backend's functions, such as interpret=... in tests.
    """

    def __init__(self, shape: LayerShape, plan: LayerPlan, **options: Any):
        self._spec, self._plan, self._options = shape.spec, plan, options
        self._module = module_of(plan)
        self._state = self._module.layer_state(shape, plan)

    def first(self, x: jax.Array, weights: LayerWeights, cache: LayerCache) -> NextAttention:
        """The first layer up to its attention.

        Args:
          x: [B, D], behind the layer's first norm.
          weights: Of the layer.
          cache: Of the layer.
        """
        attention: NextAttention
        attention, self._state = self._module.first_layer(
            x, weights, cache, self._state, self._spec, self._plan, **self._options
        )
        return attention

    def after_attention(
        self,
        attended: jax.Array,
        hidden: jax.Array,
        weights: LayerWeights,
        following: LayerWeights | HeadWeights | None,
        cache: LayerCache | None,
    ) -> tuple[jax.Array, NextAttention | jax.Array | None]:
        """A layer after its attention, and what follows up to the next attention.

        Args:
          attended: [B, N, H], attention's output.
          hidden: [B, D], the residual stream before the layer: what this returned for the layer before.
          weights: Of the layer.
          following: The next layer's weights; behind the last layer those of the head, or None to leave it out.
          cache: Of the next layer; None behind the last one.

        Returns:
          hidden [B, D] after the layer, of which a part may still be in the state if something follows; what the next
          layer's attention reads, or logits [B, V] float32, or None.
        """
        hidden, result, self._state = self._module.layer(
            attended, hidden, weights, following, cache, self._state, self._spec, self._plan, **self._options
        )
        return hidden, result
