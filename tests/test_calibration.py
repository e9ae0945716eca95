"""Recorded scores against float64, the phi that follows from them, its file, and what it is worth in decoding."""

import dataclasses
import functools
import json
import math
import pathlib
import subprocess
import sys
import sysconfig

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calibration_case import calibration_of
from flax import nnx

import fdpp_jax
from fdpp_jax import Calibration, UnifiedMax, calibration, decode_loop, models, score_stats
from fdpp_jax.ops import reference
from fdpp_jax.plans.calls import AttentionArrays, AttentionOptions
from fdpp_jax.score_stats import Distribution

FIXTURE = pathlib.Path(__file__).parent / "fixtures" / "llama3_gqa"


@pytest.fixture(scope="module")
def model():
    return models.load(FIXTURE, dtype=jnp.float32)


def same(a, b):
    """Whether two calibrations recorded the same."""
    arrays = zip(jax.tree.leaves(a.stats), jax.tree.leaves(b.stats), strict=True)
    return all(np.array_equal(x, y) for x, y in arrays) and (a.num_sequences, a.num_tokens) == (
        b.num_sequences,
        b.num_tokens,
    )


# Of few tokens, as most tests have.
calibrate = functools.partial(fdpp_jax.calibrate, min_tokens=1)


def random_tokens(batch, length, seed=0):
    return np.random.default_rng(seed).integers(0, 128, (batch, length))


# Recording.


@pytest.mark.parametrize(
    ("length", "options"),
    [
        (40, {}),  # 2.5 blocks
        (16, {"scale": 0.7}),
        (40, {"logits_soft_cap": 5.2, "scale": 1.0}),
        (40, {"local_window_size": (9, 0)}),
        (1, {}),
    ],
    ids=str,
)
def test_what_is_recorded_equals_float64(monkeypatch, length, options):
    monkeypatch.setattr(score_stats, "_BLOCK_KEYS", 16)
    rng = np.random.default_rng(0)
    batch, heads, kv_heads, size = 3, 4, 2, 8
    query = rng.normal(size=(batch, length, heads, size)).astype(np.float32) * 3
    key, value = rng.normal(size=(2, batch, length, kv_heads, size)).astype(np.float32)
    live = np.arange(length) < np.array([length, length // 2, 0])[:, None]
    record = jax.jit(functools.partial(score_stats.attend_and_record, **options))
    out, stats = record(query, key, value, live)

    options = {"scale": size**-0.5, "is_causal": True} | options
    static = AttentionOptions(**options)
    expected = jax.jit(lambda *arrays: reference.attention(AttentionArrays(*arrays), static))(query, key, value)
    np.testing.assert_allclose(out, expected, atol=1e-5)

    scores = np.einsum("btnh,bsnh->bnts", query.astype(np.float64), key.repeat(2, axis=2)) * options["scale"]
    if cap := options.get("logits_soft_cap"):
        scores = cap * np.tanh(scores / cap)
    distance = np.arange(length)[:, None] - np.arange(length)
    mask = (distance >= 0) & (distance <= options.get("local_window_size", (length, 0))[0])
    for head in range(heads):
        rows = [scores[b, head, t][mask[t]] for b in range(batch) for t in range(length) if live[b, t]]
        values = {
            "scores": np.concatenate(rows),
            "row_max": [row.max() for row in rows],
            "log_den": [np.log(np.exp(row).sum()) for row in rows],
        }
        for name, values_of_head in values.items():
            distribution = getattr(stats, name)
            counts = np.histogram(values_of_head, bins=4000, range=(-1000, 1000))[0]
            # float32 may put a value that lies on an edge into the next bin.
            assert abs(np.cumsum(counts) - np.cumsum(np.asarray(distribution.counts[head], np.int64))).max() <= 1
            assert distribution.counts[head].sum() == len(values_of_head)
            np.testing.assert_allclose(distribution.low[head], np.min(values_of_head), rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(distribution.high[head], np.max(values_of_head), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama3_gqa", "gemma2"])
def test_each_layer_sees_what_it_sees_without_a_probe(monkeypatch, family):
    """Also with scale, soft cap and window of the family."""
    monkeypatch.setattr(score_stats, "_BLOCK_KEYS", 16)
    model = models.load(FIXTURE.parent / family, dtype=jnp.float32)
    tokens = jnp.asarray(random_tokens(2, 40) % model.config.vocab_size)

    def attend(layer, query, key, value):
        options = model.config.attention_options(layer)
        return score_stats.attend_and_record(query, key, value, jnp.ones((2, 40), bool), **options)[0]

    probed = jax.jit(lambda tokens: model.head(model.hidden_states(tokens, jnp.arange(40)[None], attend)))(tokens)
    # Rounding moves logits by up to 2e-5, a missing option by more than 3.
    np.testing.assert_allclose(probed, jax.jit(model)(tokens), atol=1e-4)


def test_scores_beyond_the_bins_count_in_the_outermost():
    query = jnp.full((1, 2, 1, 2), 1e4)
    key = jnp.array([1.0, -1.0])[None, :, None, None] * jnp.ones((1, 2, 1, 2))
    _, stats = jax.jit(score_stats.attend_and_record)(query, key, key, jnp.ones((1, 2), bool))
    assert stats.scores.counts[0, [0, -1]].tolist() == [1, 2]
    np.testing.assert_allclose([stats.scores.low[0], stats.scores.high[0]], [-(2**0.5) * 1e4, 2**0.5 * 1e4], rtol=1e-6)


def test_padding_and_order_do_not_matter_and_shapes_compile_once(model):
    rows = random_tokens(4, 24)
    lengths = np.array([24, 7, 0, 1])
    calibration._record.clear_cache()
    seen = []
    whole = calibrate(model, [(rows, lengths)], progress=seen.append)
    assert seen == [whole]
    assert (whole.num_sequences, whole.num_tokens) == (3, 32)
    assert whole.stats.log_den.counts.sum(axis=-1).tolist() == [[32] * 4] * 2
    assert whole.stats.scores.counts.sum(axis=-1).tolist() == [[24 * 25 // 2 + 7 * 8 // 2 + 1] * 4] * 2
    garbage = np.where(np.arange(24) < lengths[:, None], rows, 127)
    assert same(whole, calibrate(model, [(garbage[::-1], lengths[::-1])]))
    calibrate(model, [rows])  # no lengths: all live
    assert calibration._record._cache_size() == 1


def test_resumed_equals_in_one_go(model, tmp_path):
    batches = [random_tokens(2, 16, seed) for seed in range(3)]
    whole = calibrate(model, batches)
    calibrate(model, batches[:1]).save(tmp_path / "partial.json")
    partial = Calibration.load(tmp_path / "partial.json")
    resumed = calibrate(model, batches[1:], resume=partial)
    assert same(whole, resumed)
    assert not same(whole, partial)
    assert calibrate(model, [], resume=partial) is partial
    with pytest.raises(ValueError, match="resume must be of this model"):
        calibrate(model, batches, resume=dataclasses.replace(partial, dtype="bfloat16"))


@pytest.mark.slow
def test_a_batch_sharded_over_devices_gives_the_same(model, tmp_path):
    tokens = random_tokens(4, 24)
    np.save(tmp_path / "tokens.npy", tokens)
    code = f"""
import jax, numpy as np, fdpp_jax
mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
sharding = jax.NamedSharding(mesh, jax.P("batch"))
tokens, lengths = np.load({str(tmp_path / "tokens.npy")!r}), np.array([24, 7, 0, 1])
tokens, lengths = jax.device_put((tokens, lengths), sharding)
model = fdpp_jax.models.load({str(FIXTURE)!r}, dtype="float32")
fdpp_jax.calibrate(model, [(tokens, lengths)], min_tokens=1).save({str(tmp_path / "sharded.json")!r})
"""
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu", "PATH": ""}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=environment, cwd=FIXTURE.parents[2])
    sharded = Calibration.load(tmp_path / "sharded.json")
    alone = calibrate(model, [(tokens, np.array([24, 7, 0, 1]))])
    for name in ("scores", "row_max", "log_den"):
        a, b = getattr(alone.stats, name), getattr(sharded.stats, name)
        np.testing.assert_allclose(a.low, b.low, atol=1e-5)
        np.testing.assert_allclose(a.high, b.high, atol=1e-5)
        assert abs(a.counts.cumsum(axis=-1) - b.counts.cumsum(axis=-1)).max() <= 1


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (np.zeros(3, int), r"tokens must be integers \[B, T\], got int\d+ of shape \(3,\)"),
        (np.zeros((1, 3)), r"tokens must be integers \[B, T\], got float"),
        (np.zeros((1, 0), int), "tokens must be integers"),
        ((np.zeros((2, 3), int), np.array([3])), r"lengths must be integers \[2\], got int\d+ of shape \(1,\)"),
        ((np.zeros((1, 3), int), np.array([4])), r"lengths must be within 0..3 .* got \[4\]"),
        (np.full((1, 3), 128), "tokens must be within 0..127, got 128"),
        (np.zeros((1, 513), int), "513 tokens a sequence need as many positions, the model has 512"),
        (np.zeros((2**14, 512), int), "more scores a head than 32 bits can count"),
        ((np.zeros((1, 3), int), np.array([0])), "batches hold no token"),
    ],
)
def test_batches_that_do_not_fit_are_refused(model, batch, message):
    with pytest.raises(ValueError, match=message):
        calibrate(model, [batch])


def test_few_tokens_are_refused_unless_told_and_the_verdict_says_so(model):
    with pytest.raises(ValueError, match=r"expected at least 1024 tokens, got 4: .* or a lower min_tokens"):
        fdpp_jax.calibrate(model, [random_tokens(1, 4)])
    few = fdpp_jax.calibrate(model, [random_tokens(1, 4)], min_tokens=4)
    for level in calibration.LEVELS:
        assert few.judge(level).reason.endswith("; of only 4 tokens, so up to 75 % of a head's rows may lie outside")
    assert few.unified_max() is not None
    with pytest.raises(ValueError, match="expected at least 9 tokens, got 8"):
        fdpp_jax.calibrate(model, [random_tokens(1, 4, 1)], resume=few, min_tokens=9)
    enough = fdpp_jax.calibrate(model, [random_tokens(2, 512)])
    assert enough.judge().reason.endswith(" to spare at either end")


def test_scores_that_are_not_finite_are_refused():
    broken = models.load(FIXTURE, dtype=jnp.float32)
    broken.model.layers[1].input_layernorm.weight.set_value(jnp.full(64, jnp.nan))
    with pytest.raises(ValueError, match="not finite in layer 1, head 0"):
        calibrate(broken, [random_tokens(1, 4)])


# From scores to phi.


def test_phi_leaves_the_same_room_at_both_ends():
    found = calibration_of([[-10, 0], [5, 5]], [[10, 30], [15, 20]])
    room = 64 * math.log(2)
    for level, phi, margin in (
        ("model", 10.0, room - 20),
        ("layer", [10.0, 12.5], room - 20),
        ("head", [[0.0, 15.0], [10.0, 12.5]], room - 15),
    ):
        judgement = found.judge(level)
        np.testing.assert_allclose(judgement.phi, phi)
        assert judgement.margin_nats == pytest.approx(margin)
        assert judgement.fits
        assert judgement.recompute_rate == 0
        policy = found.unified_max(level)
        np.testing.assert_allclose(np.squeeze(policy.phi), phi)
    assert found.unified_max().phi == 10.0
    assert found.unified_max("layer").phi.shape == (2, 1, 1)
    assert found.unified_max("head").phi.shape == (2, 1, 2)
    assert found.judge("head").reason.startswith("layer 0, head 1: ln den from 0.0 to 30.0 spans 30.0 nats")
    with pytest.raises(ValueError, match="level must be one of model, layer, head, got 'row'"):
        found.judge("row")


def test_a_range_wider_than_the_window_is_refused_with_the_reason():
    """OPT-6.7B's range. A phi for each layer may still fit."""
    found = calibration_of([[-496.8], [330.0]], [[-450.0], [363.5]])
    assert found.unified_max() is None
    judgement = found.judge()
    assert judgement.reason == (
        "ln den from -496.8 to 363.5 spans 860.3 nats, the window of bfloat16 88.7: 771.6 too few, the best phi leaves "
        "1,024 of 2,048 rows (0.5) outside"
    )
    assert judgement.recompute_rate == 0.5
    assert judgement.margin_nats == pytest.approx(-771.6 / 2, abs=0.1)
    assert found.unified_max("layer").phi.ravel().tolist() == pytest.approx([-473.4, 346.75], abs=1e-4)
    partly = calibration_of([[-496.8, 0.0]], [[363.5, 1.0]])
    assert partly.unified_max("head") is None
    assert partly.judge("head").recompute_rate == 0.25


def one_head_of(counts, low, high, **options):
    """A calibration of one head with `counts` rows in the bins [keys, in nats]."""
    values = np.zeros(4000, np.int64)
    for nats, count in counts.items():
        values[int((nats + 1000) / 0.5)] = count
    rows = Distribution(values[None, None], np.array([[low]], np.float32), np.array([[high]], np.float32))
    found = calibration_of([[0.0]], [[0.0]], **options)
    return dataclasses.replace(found, stats=score_stats.Stats(rows, rows, rows), num_tokens=int(values.sum()))


@pytest.mark.parametrize(("outlier", "end"), [(-300.0, -300.0), (300.0, 300.2), (-1000.0, -1234.0)])
def test_an_outlier_is_redone_and_moves_no_phi(outlier, end):
    """The others lie in -10 .. 30."""
    found = one_head_of({-10.0: 1, 0.0: 999_996, 29.5: 2, outlier: 1}, min(end, -10.0), max(end, 30.0))
    judgement = found.judge()
    assert (judgement.phi, judgement.recompute_rate) == (10.0, 1e-6)
    assert judgement.margin_nats == pytest.approx(64 * math.log(2) - 20)
    rest = "88.7: 1 of 1,000,000 rows (1e-06) will be redone, the others have 24.4 to spare at either end"
    assert judgement.reason.endswith(rest)
    assert found.unified_max() == UnifiedMax(10.0)


def test_one_row_in_ten_thousand_may_be_outside():
    assert one_head_of({0.0: 9999, 200.0: 1}, 0.0, 200.0).judge().fits
    refused = one_head_of({0.0: 9998, 200.0: 2}, 0.0, 200.0).judge()
    assert (refused.fits, refused.recompute_rate) == (False, 2e-4)
    assert refused.margin_nats == pytest.approx((128 * math.log(2) - 200) / 2)
    np.testing.assert_allclose(refused.phi, 0.25)


def test_of_equally_good_ranges_the_middle_one_is_taken():
    """The window of bfloat16 has room for 177 bins: for any 88.5 of these 200 nats."""
    found = one_head_of(dict.fromkeys(np.arange(-100, 100, 0.5), 1), -100.0, 100.0)
    assert float(found.judge().phi) == pytest.approx(0, abs=0.5)
    assert found.judge().recompute_rate == 1 - 177 / 400


@pytest.mark.parametrize("spread", [20, 60, 200])
def test_a_finer_level_never_leaves_more_outside(spread):
    rng = np.random.default_rng(spread)
    values = rng.normal(0, spread, (3, 4, 1)) + rng.standard_t(2, (3, 4, 500)) * spread / 4  # [L, N, rows]
    counts = np.apply_along_axis(lambda x: np.histogram(x.clip(-999.9, 999.9), 4000, (-1000, 1000))[0], -1, values)
    rows = Distribution(counts, values.min(axis=-1), values.max(axis=-1))
    found = dataclasses.replace(calibration_of([[0]], [[0]]), stats=score_stats.Stats(rows, rows, rows))
    judged = [found.judge(level) for level in calibration.LEVELS]
    rates = [judgement.recompute_rate for judgement in judged]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > rates[2]
    bottom, top = found.window()
    for judgement in judged:  # what is promised holds for the values themselves
        phi = judgement.phi.reshape(judgement.phi.shape + (1,) * (3 - judgement.phi.ndim))
        outside = np.mean((values - phi < bottom) | (values - phi > top))
        assert outside <= judgement.recompute_rate <= outside + 0.02


def test_the_window_is_that_of_the_dtype_and_the_capacity():
    found = calibration_of([[0.0]], [[11.0]], dtype="float16", max_keys=1024)
    assert found.judge().margin_nats == pytest.approx((math.log(2**15 / (1024 * 2**-14)) - 11) / 2)
    assert found.judge(capacity=2**15).margin_nats < 0
    assert found.unified_max(capacity=2**15) is None
    assert found.unified_max(capacity=2**15, dtype="bfloat16").phi == 5.5


def test_the_central_range_leaves_the_tails_out():
    counts = np.zeros((1, 1, 4000), np.int64)
    counts[0, 0, [1000, 2000, 2001, 3000]] = [1, 50_000, 49_997, 2]
    found = Distribution(counts, np.array([[-500.0]]), np.array([[500.25]]))
    assert [end.item() for end in found.central_range()] == [0.0, 1.0]
    assert [end.item() for end in found.central_range(1.0)] == [-500.0, 500.25]


# Layers with a phi of their own.


@jax.jit(static_argnums=(0, 3))
def _forced_decoding(graphdef, weights, tokens, capacity, softmax):
    model = nnx.merge(graphdef, weights)
    with_norms = softmax is not None and softmax.is_bound
    cache = models.KVCache.create(model.config, 1, capacity, model.dtype, with_key_norms=with_norms)

    def step(cache, pair):
        token, target = pair
        logits, cache, redone = decode_loop.decode_step(model, token[None], cache, softmax)
        return cache, (-jax.nn.log_softmax(logits[0])[target], redone)

    _, (losses, redone) = jax.lax.scan(step, cache, (tokens[:-1], tokens[1:]))
    return losses, redone


def perplexity(model, tokens, softmax):
    """Perplexity by decode steps, and the share of steps that were redone."""
    if softmax is not None and not softmax.is_bound:
        softmax = UnifiedMax(jnp.asarray(softmax.phi, jnp.float32))
    graphdef, weights = nnx.split(model)
    losses, redone = _forced_decoding(graphdef, weights, jnp.asarray(tokens), len(tokens), softmax)
    return float(np.exp(np.asarray(losses, np.float64).mean())), float(np.mean(redone))


def test_each_layer_takes_its_own_phi_and_no_value_recompiles(model):
    tokens = random_tokens(1, 12)[0]
    expected, _ = perplexity(model, tokens, None)
    found = calibrate(model, [random_tokens(2, 16)])
    for level in ("layer", "head"):
        policy = found.unified_max(level)
        assert perplexity(model, tokens, policy) == (pytest.approx(expected, rel=1e-6), 0)
        before = _forced_decoding._cache_size()
        off = policy.phi.at[1].add(200.0)  # of one layer alone
        assert perplexity(model, tokens, UnifiedMax(off)) == (pytest.approx(expected, rel=1e-6), 1)
        assert _forced_decoding._cache_size() == before
    with pytest.raises(ValueError, match=r"phi of each layer must be \[2, B, N\], got shape \(3, 1, 1\)"):
        perplexity(model, tokens, UnifiedMax(jnp.zeros((3, 1, 1))))


# The file.


def test_a_file_holds_all_of_it(model, tmp_path):
    found = calibrate(model, [random_tokens(2, 16)])
    path = tmp_path / "fdpp_calibration.json"
    dataclasses.replace(found, data="some text", weights="0123456789abcdef", date="2026-11-23").save(path)
    loaded = Calibration.load(path)
    assert same(found, loaded)
    assert (loaded.data, loaded.date, loaded.dtype, loaded.max_keys) == ("some text", "2026-11-23", "float32", 512)
    assert loaded.weights == "0123456789abcdef"
    assert loaded.versions["fdpp-jax"] == fdpp_jax.__version__
    assert loaded.stats.scores.counts.dtype == np.int64
    assert loaded.unified_max() == found.unified_max()
    found.save(path)
    assert len(Calibration.load(path).date) == len("2026-11-23")


def _break(content, keys, value):
    for key in keys[:-1]:
        content = content[key]
    if value is None:
        del content[keys[-1]]
    else:
        content[keys[-1]] = value


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (["format"], 2, "expected format to be 1, got 2"),
        (["bin_nats"], 1.0, "expected bin_nats to be 0.5, got 1.0"),
        (["dtype"], None, "dtype is missing"),
        (["dtype"], "int8", "expected dtype to be one of bfloat16, float16, float32, got 'int8'"),
        (["num_tokens"], "many", "expected num_tokens to be a positive integer, got 'many'"),
        (["num_tokens"], 3, r"layers\[0\].row_max\[0\].counts must add up to num_tokens = 3, got 1024"),
        (["max_keys"], 0, "expected max_keys to be a positive integer, got 0"),
        (["versions"], [], r"expected versions to be an object, got \[\]"),
        (["layers"], [], "layers is empty"),
        (["layers", 1], 7, r"expected layers\[1\] to be an object, got 7"),
        (["layers", 1, "log_den"], None, r"layers\[1\].log_den is missing"),
        (["layers", 1, "log_den", 1], None, r"layers\[1\].log_den must hold 2 heads, got 1"),
        (["layers", 0, "scores", 1, "low"], "x", r"expected layers\[0\].scores\[1\].low to be a number, got 'x'"),
        (["layers", 0, "scores", 1, "low"], 1e9, r"layers\[0\].scores\[1\].low must not exceed high"),
        (
            ["layers", 0, "scores", 0, "counts"],
            [1, -1],
            r"expected layers\[0\].scores\[0\].counts to be a list of integers of at least 0, .*, got \[1, -1\]",
        ),
        (["layers", 0, "scores", 0, "first_bin"], 4000, r"first_bin and \d+ counts must lie in 4000 bins, got 4000"),
    ],
)
def test_a_malformed_file_is_named_with_its_field(tmp_path, keys, value, message):
    path = tmp_path / "fdpp_calibration.json"
    calibration_of([[-10, 0], [5, 5]], [[10, 30], [15, 20]]).save(path)
    content = json.loads(path.read_text())
    _break(content, keys, value)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"fdpp_calibration.json is not a calibration: .*{message}"):
        Calibration.load(path)


def test_a_file_that_is_no_json_or_not_there(tmp_path):
    path = tmp_path / "fdpp_calibration.json"
    with pytest.raises(ValueError, match=r"expected fdpp_calibration\.json in"):
        Calibration.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"fdpp_calibration.json is not valid JSON"):
        Calibration.load(path)


# What it is worth.


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "rounding"), [("float32", 1e-5), ("bfloat16", 2**-8)])
def test_perplexity_of_held_out_text_never_depends_on_phi(dtype, rounding):
    """Decode steps of the bundled model, calibrated on one file that it never saw, on another."""
    model = models.load(models.bundled_path(), dtype=jnp.dtype(dtype))
    tokenizer = models.load_tokenizer(models.bundled_path())
    stdlib = pathlib.Path(sysconfig.get_path("stdlib"))
    start = tokenizer.encode("")
    ids = [tokenizer.encode((stdlib / name).read_text(encoding="utf-8")) for name in ("enum.py", "getopt.py")]
    pieces = [start + ids[0][i : i + 511] for i in range(1, 2 * 511, 511)]
    found = fdpp_jax.calibrate(model, [np.array(pieces)])
    phi = found.unified_max().phi
    policies = {"online": None, "bound": UnifiedMax.bound(), "calibrated": UnifiedMax(phi)}
    policies |= {f"{off:+}": UnifiedMax(phi + off) for off in (20, 40, 60, 120, -60)}
    held_out = start + ids[1][600:900]
    measured = {name: perplexity(model, held_out, policy) for name, policy in policies.items()}
    print({name: (round(ppl, 5), round(rate, 4)) for name, (ppl, rate) in measured.items()})
    expected = measured["online"][0]
    assert 2 < expected < 20
    rates = {name: rate for name, (_, rate) in measured.items()}
    for ppl, _ in measured.values():
        assert ppl == pytest.approx(expected, rel=rounding)
    assert [rates[name] for name in ("online", "calibrated", "+20")] == [0] * 3
    assert rates["bound"] < 0.02
    assert 0 < rates["+40"] < 1
    assert [rates[name] for name in ("+60", "+120", "-60")] == [1] * 3


def test_memory_that_is_used_up_by_a_batch(monkeypatch):
    def exhausted(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12345 bytes.")

    monkeypatch.setattr(calibration, "_record", exhausted)
    with pytest.raises(MemoryError, match=r"allocate 12345 bytes\. .*: the weights take [\d.]+ MB\. Lower the batch"):
        calibration.calibrate(models.load(models.bundled_path()), [np.zeros((1, 8), np.int32)])
