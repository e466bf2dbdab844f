"""Parameters on several devices, and a different current device."""

import numpy as np
import pytest
from devices import two
from on_device import arrays
from variants import bits

from rmsprop_gpu import RMSProp, rmsprop_update

pytestmark = pytest.mark.gpu
cupy = pytest.importorskip("cupy", exc_type=ImportError)
F4 = np.float32


@two
@pytest.mark.usefixtures("pool")
def test_parameters_on_two_devices(launched):
    host = [np.random.default_rng(i).standard_normal(n).astype(F4) for i, n in enumerate((9000, 5, 300))]
    places = (0, 1, 0)

    def on_devices(xs):
        made = []
        for place, x in zip(places, xs, strict=True):
            with cupy.cuda.Device(place):
                made.append(cupy.asarray(x))
        return made

    params, want = on_devices(host), [x.copy() for x in host]
    opt, twin = RMSProp(params, bias_correction=True), RMSProp(want, bias_correction=True)
    held = []
    for k in range(4):
        grads = [x * (k + 1) for x in host]
        held.append(on_devices(grads))  # at new addresses
        opt.step(held[-1])
        twin.step(grads)
        assert cupy.cuda.runtime.getDevice() == 0
    assert len(launched) == 4 * 4  # prepare and update on each
    for i, (place, p) in enumerate(zip(places, params, strict=True)):
        assert all(x.device.id == place for x in opt.state[i].values())
        with cupy.cuda.Device(place):
            assert bits(p) == bits(want[i])
            for name, x in twin.state[i].items():
                assert bits(opt.state[i][name]) == bits(x)
    saved = opt.state_dict()
    assert [saved["state"][str(i)]["square_avg"].device.id for i in range(3)] == list(places)
    opt.load_state_dict(saved)
    assert repr(opt).splitlines()[0].endswith("of float32 on cuda:0, cuda:1, 37,256 bytes of state, 4 steps)")
    with pytest.raises(TypeError, match=r"grads\[1\] is a cupy.ndarray on cuda:0, but the parameter is on cuda:1"):
        opt.step([cupy.asarray(x) for x in host])


@two
@pytest.mark.usefixtures("pool")
def test_the_current_device_need_not_be_that_of_the_arrays():
    with cupy.cuda.Device(1):
        params, grads = arrays(0), arrays(1)
    opt = RMSProp(params)
    for _ in range(2):
        opt.step(grads)
    with cupy.cuda.Device(1):
        opt.lr = 0.5
        opt.step(grads)
        square_avg = cupy.zeros(params[0].size, F4)
    rmsprop_update(params[0], grads[0], square_avg, lr=0.1)
    assert cupy.cuda.runtime.getDevice() == 0
    assert opt.steps == 3


def ones_on_two_devices():
    made = []
    for place in (0, 1):
        with cupy.cuda.Device(place):
            made.append(cupy.ones(5, F4))
    return made


@two
@pytest.mark.usefixtures("pool")
def test_a_failure_on_the_second_device_leaves_the_current_device():
    params, grads = ones_on_two_devices(), ones_on_two_devices()
    opt = RMSProp(params)
    opt.step(grads)

    def fail():
        raise RuntimeError("out of resources")

    fail.kernel = "update_kernel"
    opt._planner._plan.steps._calls[-1] = fail
    with pytest.raises(RuntimeError, match="between two steps"):
        opt.step(grads)
    assert cupy.cuda.runtime.getDevice() == 0


@two
@pytest.mark.usefixtures("pool")
def test_a_capture_on_one_device_of_two_is_refused():
    params, grads = ones_on_two_devices(), ones_on_two_devices()
    opt = RMSProp(params)
    opt.step(grads)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        with pytest.raises(RuntimeError, match="on the current stream of one device and not on another's"):
            opt.step(grads)
        stream.end_capture()
    opt.step(grads)
    assert [int(opt.state[i]["step"]) for i in (0, 1)] == [2, 2]
