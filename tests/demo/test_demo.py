"""The demo: what it learns, and whether its measurements and its check of updates can be trusted."""

import sys
import time

import numpy as np
import pytest

from rmsprop_gpu import reference
from rmsprop_gpu.demo import report, train
from rmsprop_gpu.demo.oracle import Deviation, Oracle
from rmsprop_gpu.demo.train import Run, Settings
from rmsprop_gpu.extras import MissingExtraError

PARAMETERS = 64 * 128 + 128 + 128 * 64 + 64 + 64 * 10 + 10
TRAIN, TEST = 1437, 360  # of 1,797 digits


def trained(**settings):
    run = Run(Settings(**settings))
    run.load()
    for _ in run.epochs():
        pass
    return run


def beyond_bound(steps):
    """The largest relative error of an update, apart from the rounding of the parameter.

    The rule rounds u = g / (sqrt(v) + eps) three times, by 2**-24 each, and the root halves the error of v. That is at
    most steps + 2 roundings: a square is rounded twice on entry, ((1 - alpha) * g) * g (in AdaGrad not at all), then
    once per step with the whole sum. lr * u is not rounded: it is a factor of the fma that ends in the parameter.
    """
    return (3 + (steps + 2) / 2) * 2.0**-24


@pytest.fixture(scope="module")
def default_run():
    return trained().summary()


def test_default_run_reaches_97_percent_in_30_seconds(default_run):
    assert default_run["accuracy"] >= 0.97
    assert default_run["seconds"] < 30
    assert default_run["hyperparameters"]["lr"] == 3e-3


def test_default_run_counts(default_run):
    steps = 60 * 45  # 45 batches of 32, the last of 29
    want = {
        "parameters": PARAMETERS,
        "tensors": 6,
        "steps": steps,
        "bytes_moved": 20 * PARAMETERS * steps,
        "epochs": 60,
    }
    assert {name: default_run[name] for name in want} == want
    assert len(default_run["history"]) == 60
    assert default_run["gb_per_second"] == default_run["bytes_moved"] / default_run["update_seconds"] / 1e9
    assert default_run["digits"] == {"train": TRAIN, "test": TEST}


def test_default_run_deviates_by_rounding(default_run):
    found = dict(default_run["deviation"])
    assert found.pop("matches") is True
    deviation = Deviation(**found)
    # Half an ulp of a parameter below 1 is at most 2**-25. The largest initial weight is about 0.8.
    assert 0 < deviation.rounding <= 2.0**-24
    assert 0 < deviation.largest <= 1.1 * deviation.rounding
    assert 0 < deviation.beyond < beyond_bound(default_run["steps"])


def test_adagrad_learns_too():
    summary = trained(optimizer="adagrad", check=False).summary()
    assert summary["optimizer"] == "AdaGrad"
    assert summary["accuracy"] >= 0.97


@pytest.mark.parametrize("hyper", [{}, {"eps_in_sqrt": True}, {"weight_decay": 1e-3, "decoupled_weight_decay": True}])
@pytest.mark.parametrize("optimizer", ["rmsprop", "adagrad"])
def test_few_steps_deviate_by_few_roundings(optimizer, hyper):
    run = trained(optimizer=optimizer, hyper=hyper, epochs=2, batch_size=360)
    # Decoupled decay rounds lr * weight_decay once, while the oracle gets its factors: at most 3 more roundings.
    bound = beyond_bound(8) + 3 * 2.0**-24 * bool(hyper.get("weight_decay"))
    assert 0 < run.oracle.deviation.beyond < bound == run.oracle.bound(8)


@pytest.mark.parametrize("optimizer", ["rmsprop", "adagrad"])
@pytest.mark.parametrize("beyond", [1e-2, np.nan])
def test_what_is_more_than_rounding_does_not_match(optimizer, beyond):
    oracle = Run(Settings(optimizer=optimizer)).oracle
    assert oracle.summary(1000)["matches"]
    oracle.deviation.beyond = beyond
    assert not oracle.summary(1000)["matches"]
    assert not oracle.summary(100_000)["matches"]


@pytest.mark.parametrize("optimizer", ["rmsprop", "adagrad"])
@pytest.mark.parametrize("hyper", [{}, {"lr": 0.01, "eps": 1e-3, "initial_scale": 0.5}])
def test_three_lines_do_the_same(optimizer, hyper):
    run = trained(optimizer=optimizer, hyper=hyper, epochs=2, batch_size=360, check=False)
    for name, param in run.params.items():
        # 8 steps, each with some five roundings of an update (below 0.1) and one of the parameter (below 2).
        np.testing.assert_allclose(run._plain[name], param, rtol=0, atol=8 * (5 * 0.1 + 2) * 2.0**-24)
    summary = run.summary()
    assert summary["switches"] == []
    assert 0 < summary["three_lines_seconds_median"] < 0.1
    assert run.opt.steps == len(run._plain_times) == 8


def test_the_three_lines_have_no_switches():
    run = trained(hyper={"momentum": 0.5, "lr": 0.1}, epochs=1, batch_size=720, check=False)
    assert run.summary()["switches"] == ["momentum"]


@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 60])
def test_ticks_are_whole_epochs(epochs, monkeypatch, tmp_path):
    figure = pytest.importorskip("matplotlib.figure").Figure
    drawn, savefig = [], figure.savefig
    monkeypatch.setattr(figure, "savefig", lambda self, *a, **k: (drawn.append(self), savefig(self, *a, **k)))
    history = [{"epoch": i + 1, "loss": 1 / (i + 1), "accuracy": 0.5} for i in range(epochs)]
    summary = {"history": history, "optimizer": "RMSProp", "hyperparameters": {"lr": 0.1}, "accuracy": 0.5}
    report.plot({**summary, "digits": {"test": TEST}}, tmp_path / "a.png")
    for axes in drawn[0].axes:
        low, high = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert ticks == [round(tick) for tick in ticks] != []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eps", 2e-8),
        ("alpha", 0.9001),
        ("eps_in_sqrt", True),
        ("maximize", True),
        ("weight_decay", 1e-5),
        ("momentum", 1e-3),
    ],
)
def test_a_wrong_update_is_seen(name, value):
    run = Run(Settings(epochs=2, batch_size=360))
    run.oracle._hyper[name] = value  # the oracle and the optimizer differ, whichever is wrong
    run.load()
    for _ in run.epochs():
        pass
    assert run.oracle.deviation.beyond > 10 * beyond_bound(8)
    assert not run.summary()["deviation"]["matches"]


def test_deviation_is_where_it_is_largest():
    run = Run(Settings())
    oracle = Oracle(run.opt)
    before = {"w": np.array([0.5, 3.0], np.float32)}
    grads = {"w": np.array([1.0, 1.0], np.float32)}
    update = 3e-3 / np.sqrt(0.1)  # of each element, except for roundings and eps
    after = {"w": (before["w"] - update + [0, 1e-3]).astype(np.float32)}
    oracle.compare(before, after, grads, 3e-3, 4)
    got = oracle.deviation
    assert got.place == "w, step 5"
    assert got.rounding == 2.0**-23  # half an ulp of 3
    np.testing.assert_allclose([got.largest, got.relative, got.beyond], [1e-3, 1e-3 / update, 1e-3 / update], rtol=1e-3)


def test_a_nan_is_never_forgotten():
    oracle = Oracle(Run(Settings()).opt)
    one = {"w": np.ones(2, np.float32)}
    oracle.compare(one, {"w": np.array([1, np.nan], np.float32)}, one, 3e-3, 0)
    oracle.compare(one, {"w": np.full(2, 5, np.float32)}, one, 3e-3, 1)
    assert np.isnan([oracle.deviation.largest, oracle.deviation.beyond]).all()
    assert oracle.deviation.place == "w, step 1"


def test_no_check_does_not_ask_the_oracle(monkeypatch):
    monkeypatch.setattr(reference, "rmsprop", None)
    assert trained(epochs=1, check=False).summary()["deviation"] is None


def test_the_check_is_not_counted_as_update(monkeypatch):
    monkeypatch.setattr(Oracle, "compare", lambda *_: time.sleep(0.2))
    summary = trained(epochs=1, batch_size=720).summary()
    assert summary["seconds"] > 0.4  # two steps
    assert summary["update_seconds"] < 0.2


@pytest.mark.parametrize(
    ("optimizer", "hyper", "bytes_an_element"),
    [
        ("rmsprop", {}, 20),
        ("adagrad", {}, 20),
        ("rmsprop", {"bias_correction": True}, 20),
        ("rmsprop", {"momentum": 0.9}, 28),
        ("rmsprop", {"centered": True}, 28),
        ("rmsprop", {"momentum": 0.9, "centered": True}, 36),
    ],
)
def test_traffic(optimizer, hyper, bytes_an_element):
    run = Run(Settings(optimizer=optimizer, hyper=hyper))
    assert train.bytes_a_step(run.opt, run.params) == bytes_an_element * PARAMETERS


def test_gradients_are_those_of_the_loss(rng):
    params = {name: x.astype(np.float64) for name, x in train.make_params(np, rng).items()}
    images, targets = rng.random((5, 64)), np.eye(10)[[3, 1, 4, 1, 5]]
    _, grads = train.loss_and_grads(np, params, images, targets)
    h = 1e-6
    for name, param in params.items():
        direction = rng.standard_normal(param.shape)
        ends = [{**params, name: param + sign * h * direction} for sign in (1, -1)]
        up, down = (train.loss_and_grads(np, end, images, targets)[0] / 5 for end in ends)
        # Central differences: truncation is off by h**2, about 1e-12, rounding of the losses by 2**-52 / h, about 1e-9.
        np.testing.assert_allclose((grads[name] * direction).sum(), (up - down) / (2 * h), rtol=1e-6, atol=1e-8)


def test_everything_is_float32_and_follows_the_params(rng):
    params = train.make_params(np, rng)
    loss, grads = train.loss_and_grads(np, params, np.ones((2, 64), np.float32), np.eye(10, dtype=np.float32)[:2])
    assert list(grads) == list(params)
    assert {x.dtype for x in (loss, *grads.values())} == {np.dtype(np.float32)}


def test_the_rate_falls_to_a_hundredth():
    run = Run(Settings(epochs=2, hyper={"lr": 0.5}))
    run.load()
    rates = [run.opt.lr(step) for step in range(2 * 45 + 1)]
    assert rates[0] == 0.5
    np.testing.assert_allclose([rates[45], rates[90]], [0.5 * 0.505, 0.5 * 0.01])
    assert rates == sorted(rates, reverse=True)


def test_the_loss_is_a_mean():
    run = trained(epochs=1, batch_size=TRAIN, check=False)
    # One step: the loss of an untrained network is log(10), plus the spread of its logits, near 1.
    assert np.log(10) < run.history[0].loss < np.log(10) + 1


def test_split_is_stratified_and_the_seed_decides():
    runs = [Run(Settings(seed=seed)) for seed in (0, 0, 1)]
    for run in runs:
        run.load()
        counts = np.bincount(run._test_labels)
        assert counts.sum() == TEST
        assert counts.min() >= 34  # the rarest digit occurs 174 times, and a fifth of that is 34.8
        assert not {image.tobytes() for image in run._test} & {image.tobytes() for image in run._train}
    for first, same, other in (
        [run._test for run in runs],
        [run.params["dense1.weight"] for run in runs],
    ):
        assert np.array_equal(first, same)
        assert not np.array_equal(first, other)


def test_the_same_seed_gives_the_same_run():
    first, same, other = (trained(epochs=2, check=False, seed=seed).history for seed in (7, 7, 8))
    assert first == same
    assert first != other


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r'^import of sklearn.*the extra demo: .*pip install .*\[demo\]"$'):
        Run(Settings()).load()
