"""A stand-in for the decode kernel, with its signature, that asks the float64 oracle: how ops call it is tested."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from fdpp_jax import unified_max
from fdpp_jax.pallas import run as pallas_run
from fdpp_jax.plans import device


@pytest.fixture
def kernel_calls(request, monkeypatch):
    """Makes this an H200 whose decode kernel is a stand-in; the list of its traced calls."""
    calls = []

    def attend(
        arrays, options, config, *, recompute=False, prior=None, redone=None, starts_early=False, interpret=None
    ):
        assert interpret is None
        assert not (recompute or prior is not None) or config.combine == "kernel"
        query, key, phi = arrays.query, arrays.key, arrays.phi
        calls.append(
            dict(
                shape=query.shape,
                key=key.shape,
                phi=phi,
                config=config,
                recompute=recompute,
                prior=prior,
                starts_early=starts_early,
            )
        )

        def compute(phi, prior, redone, arrays):
            arrays = jax.tree.map(np.asarray, arrays)
            static = dataclasses.asdict(options)
            del static["return_residual"]
            out, log_sum = oracle.attention_and_log_sum(**arrays, **static)
            failed = np.zeros(log_sum.shape, bool) if prior is None else np.isnan(prior).any(axis=-1)  # [B, T, N]
            if phi is not None:
                low, high = np.log(unified_max.window(query.dtype, capacity))
                log_den = log_sum - np.broadcast_to(phi, (len(out), out.shape[2]))[:, None]
                failed |= np.isfinite(log_sum) & ~((log_den >= low) & (log_den <= high))
                if not recompute:
                    out[failed] = log_sum[failed] = np.nan
            out = out.astype(query.dtype)
            out = out if prior is None else np.where(np.isnan(prior), out, prior)
            if options.return_residual:
                if prior is not None:  # undefined where nothing is redone
                    groups = np.repeat(
                        failed.any(axis=1).reshape(len(out), key.shape[2], -1).any(axis=2),
                        query.shape[2] // key.shape[2],
                        axis=1,
                    )
                    log_sum = np.where(groups[:, None], log_sum, 777.0)
                out = out, log_sum.astype(np.float32)
            by_head = failed.any(axis=1).reshape(len(failed), key.shape[2], -1)  # [B, K, G]
            return out if redone is None else (out, np.where(by_head.any(axis=2), 1, redone))

        capacity, arrays = arrays.capacity, arrays._asdict()
        del arrays["phi"], arrays["scale"]
        result = jax.ShapeDtypeStruct(query.shape, query.dtype)
        if options.return_residual:
            result = result, jax.ShapeDtypeStruct(query.shape[:3], jnp.float32)
        result = result if redone is None else (result, jax.ShapeDtypeStruct(redone.shape, redone.dtype))
        return jax.pure_callback(compute, result, phi, prior, redone, arrays)

    ours, theirs = (inspect.signature(f).parameters for f in (attend, pallas_run.attend))
    assert list(ours) == list(theirs)
    monkeypatch.setattr(pallas_run, "attend", attend)
    monkeypatch.setattr(device, "lowered_for", lambda platform, planned: planned)
    # A device of the test's own: what JAX has compiled with another test's stand-in is not taken.
    with device.target(dataclasses.replace(device.by_name("H200"), kind=request.node.name)):
        yield calls
