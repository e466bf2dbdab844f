"""What only a separate process can show: imports, threads, forks, interrupts, memory."""

import os
import subprocess
import sys

import pytest
from devices import MODULES
from processes import run, start


def layers():
    """The threading layers of Numba that are installed."""
    found = ["workqueue"]
    for layer in ("omp", "tbb"):
        code = f"import numba.np.ufunc.{layer}pool"
        if not subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode:
            found.append(layer)
    return found


@pytest.fixture(params=layers())
def layer(request):
    return request.param


@pytest.fixture(params=["compiled", "from disk"])
def prints(request):
    """What a program prints if it compiles its kernels, or finds them on disk."""

    def prints(code, **environment):
        if request.param == "compiled":
            return run(code, RMSPROP_GPU_CACHE="0", **environment)
        run(code, **environment)
        return run(code, **environment)

    return prints


def test_import_loads_no_gpu_library():
    code = """
import sys, rmsprop_gpu
rmsprop_gpu.RMSProp([__import__("numpy").zeros(3)]).step([__import__("numpy").zeros(3)])
print([m for m in sys.modules if m.split(".")[0] in ("cupy", "numba_cuda", "torch", "sklearn", "rich", "matplotlib")
       or m.startswith("numba.cuda.cudadrv")])
"""
    assert run(code) == "[]"


JIT_OFF = """
import {module} as xp, numba, numpy, sys
from rmsprop_gpu import RMSProp, reference, rmsprop_update
{before}
opt = RMSProp(xp.ones(200_000, xp.float32), initial_scale=1.0, use_ema=True)
assert "p = p - 0.01 * u" in opt.explain() and "200,000 parameters" in repr(opt)
opt.load_state_dict(opt.state_dict())
for refused in (
    lambda: opt.step(xp.ones(200_000, xp.float32)),
    lambda: opt.compile(),
    lambda: opt.kernels(),
    lambda: rmsprop_update(xp.ones(3), xp.ones(3), xp.ones(3), lr=0.1),
):
    try:
        refused()
    except RuntimeError as error:
        print(error)
assert opt.steps == 0 and (opt.param_groups[0]["params"][0] == 1).all()
try:
    opt.step(xp.ones(3, xp.float32), grad_scale=0)
except ValueError as error:
    assert "grad_scale is 0" in str(error)
"""


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("when", ["from the start", "later", "and on again"])
def test_without_a_compiler_a_step_is_refused_and_what_needs_none_works(module, when):
    before = {
        "from the start": "",
        "later": "numba.config.DISABLE_JIT = 1",
        "and on again": "numba.config.DISABLE_JIT = 0",
    }
    off = {} if when == "later" else {"NUMBA_DISABLE_JIT": "1"}
    said = run(JIT_OFF.format(module=module, before=before[when]), **off).splitlines()
    assert len(said) == 4
    assert set(said) == {
        "Numba's compiler is off (NUMBA_DISABLE_JIT is set, or was when rmsprop_gpu was imported), and no kernel runs "
        "without it; unset it in a new process, or use rmsprop_gpu.reference, the same mathematics in plain Python"
    }


THREADS = """
import threading, numba, numpy as np
from rmsprop_gpu import RMSProp
numba.set_num_threads(2)
problems = [(np.ones(200_000, np.float32), np.full(200_000, k + 1, np.float32)) for k in range(8)]
def work(param, grad):
    opt = RMSProp(param, momentum=0.5 * (grad[0] % 2))
    for _ in range(200):
        opt.step(grad)
threads = [threading.Thread(target=work, args=p) for p in problems]
[t.start() for t in threads]
[t.join() for t in threads]
for param, grad in problems:
    alone = np.ones_like(param)
    work(alone, grad)
    assert np.array_equal(alone, param)
print(numba.threading_layer())
"""


def test_optimizers_step_in_many_threads_at_a_time(layer, prints):
    assert prints(THREADS, NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS="2") == layer


@pytest.mark.skipif("omp" not in layers() or sys.platform != "linux", reason="needs GNU OpenMP")
@pytest.mark.parametrize(
    ("variables", "rounds"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, "0")],
    ids=["nothing said", "rounds", "policy"],
)
def test_threads_spin_briefly_unless_the_user_says_otherwise(variables, rounds, monkeypatch):
    """Even if Numba is asked for threads before the first step. Libraries loaded later are not affected."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    code = """
import os, numba, numpy as np
from rmsprop_gpu import RMSProp
numba.set_num_threads(2)
RMSProp(np.ones(200_000)).step(np.ones(200_000))
print(numba.threading_layer(), os.environ.get("GOMP_SPINCOUNT"))
"""
    process = start(code, NUMBA_THREADING_LAYER="omp", NUMBA_NUM_THREADS="2", OMP_DISPLAY_ENV="verbose", **variables)
    out, said = process.communicate(timeout=120)
    if "GOMP_SPINCOUNT" not in said:
        pytest.skip("needs GNU OpenMP")
    assert f"GOMP_SPINCOUNT = '{rounds}'" in said
    assert out.split() == ["omp", str(variables.get("GOMP_SPINCOUNT"))]


FORK = """
import os, threading, numba, numpy as np
from rmsprop_gpu import RMSProp
numba.set_num_threads(2)
grad = np.ones(200_000, np.float32)
def stepped(n, opt, param, **hyper):
    for _ in range(n):
        opt.step(grad)
    return param.tobytes()
def fresh(n, **hyper):
    param = np.ones(200_000, np.float32)
    return stepped(n, RMSProp(param, **hyper), param)
busy = True
def others():
    while busy:
        fresh(5)
thread = threading.Thread(target=others)
param = np.ones(200_000, np.float32)
opt = RMSProp(param)
stepped(3, opt, param)
print(numba.threading_layer())
want, new = fresh(8), fresh(4)
thread.start()
for k in range(20):
    child = os.fork()
    if not child:
        ok = stepped(5, opt, param) == want and fresh(4) == new
        if k in (0, 19):  # a Variant to be compiled in the child
            ok = ok and len(fresh(2, centered=True)) == 800_000
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0
busy = False
thread.join()
assert stepped(5, opt, param) == want
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_steps(layer, prints):
    # At each fork, Numba's TBB layer prints that it could not end its threads. Our child needs none.
    assert prints(FORK, NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS="2").splitlines()[0] == layer


def test_a_fork_during_a_compilation_does_not_hang():
    code = """
import os, threading, time, numpy as np
from rmsprop_gpu import RMSProp
def work(**hyper):
    RMSProp(np.ones(9), **hyper).step(np.ones(9))
thread = threading.Thread(target=work)
thread.start()  # compiles for about a second
children = []
while thread.is_alive() or not children:
    children.append(os.fork())
    if not children[-1]:
        work(centered=True)
        os._exit(0)
    time.sleep(0.1)
assert [os.waitpid(child, 0)[1] for child in children] == [0] * len(children)
"""
    run(code, RMSPROP_GPU_CACHE="0")


def test_ctrl_c_leaves_no_half_step(answers_ctrl_c):
    """An interrupt between two batches (two dtypes) and the step count must find all of them equally far."""
    code = """
import signal, threading, time, numpy as np
from rmsprop_gpu import RMSProp
params = [np.zeros(60_000, np.float32), np.zeros(60_000)]
grads = [np.ones(60_000, np.float32), np.ones(60_000)]
opt = RMSProp(params, lr=1.0, alpha=0.0, eps=0.0)
opt.step(grads)
for k in range(40):
    try:
        threading.Timer(0.01 + 0.0001 * k, signal.raise_signal, [signal.SIGINT]).start()
        while True:
            opt.step(grads)
    except KeyboardInterrupt:
        pass
    steps = {opt.steps, *(int(opt.state[i]["step"]) for i in (0, 1)), *(-int(x) for p in params for x in (p[0], p[-1]))}
    assert len(steps) == 1, steps
"""
    run(code)


def test_a_step_allocates_nothing_of_the_models_size():
    code = """
import tracemalloc, resource, numpy as np
from rmsprop_gpu import RMSProp
params = [np.ones(1_000_000, np.float32) for _ in range(20)] + [np.ones((100, 100), np.float32) for _ in range(100)]
grads = [np.ones_like(p) for p in params]
opt = RMSProp(params, momentum=0.9, centered=True)
opt.step(grads)
rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tracemalloc.start()
for _ in range(3):
    opt.step(grads)
print(max(tracemalloc.get_traced_memory()[1] // 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - rss))
"""
    assert int(run(code)) < 1024  # KiB


def test_memory_is_free_when_the_optimizer_goes():
    code = """
import gc, weakref, numpy as np
from rmsprop_gpu import RMSProp
gc.disable()
class Array(np.ndarray): pass  # plain arrays of ours would do, but these count as odd too
param = np.ones(9).view(Array)
opt = RMSProp([param], momentum=0.5)
opt.step([np.ones((9, 2))[:, 0]])
gone = [weakref.ref(param), weakref.ref(opt), weakref.ref(opt.state[0]["square_avg"])]
del param, opt
print([ref() is None for ref in gone])
"""
    assert run(code) == "[True, True, True]"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_profile_in_a_forked_child_needs_no_threads(layer):
    code = """
import os, numpy as np
from rmsprop_gpu import RMSProp
from rmsprop_gpu.profiling import profile
opt, grad = RMSProp(np.ones(200_000, np.float32)), np.ones(200_000, np.float32)
profile(opt, grad, repeats=1)
child = os.fork()
if not child:
    os._exit(0 if profile(opt, grad, repeats=1).rate > 0 else 1)
print(os.waitpid(child, 0)[1])
"""
    assert run(code, NUMBA_THREADING_LAYER=layer) == "0"
