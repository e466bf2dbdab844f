"""Checkpoints of a state on a device: the file is bit-identical whichever side saves it, and loads on either."""

import cuts
import numpy as np
import pytest
from variants import bits

from rmsprop_gpu import RMSProp
from rmsprop_gpu.state import pieces

pytestmark = pytest.mark.gpu
cupy = pytest.importorskip("cupy", exc_type=ImportError)
pytest.importorskip("safetensors")

GIVEN = {"momentum": 0.9, "centered": True, "use_ema": True, "clipnorm": 1.0}


def arrays(xp, seed):
    drawn = np.random.default_rng(seed).standard_normal((4, 6, 5))
    made = {
        "plain": drawn.astype(np.float32),
        "columns": np.asfortranarray(drawn[0]),
        "turned": drawn.astype(np.float32).transpose(2, 0, 1),
        "half": drawn[1].astype(np.float16),
        "scalar": np.array(drawn[2, 0, 0]),
        "empty": np.zeros((0, 3), np.float32),
    }
    return {name: xp.array(x, order="K") for name, x in made.items()}


def stepped(xp, *seeds):
    opt = RMSProp(arrays(xp, 0), **GIVEN)
    for seed in seeds:
        opt.step(arrays(xp, seed))
    return opt


def everything(opt):
    cupy.cuda.get_current_stream().synchronize()
    return [opt.steps, [bits(x) for key in opt.state for x in opt.state[key].values()]]


@pytest.mark.parametrize("size", [16 << 20, 40, 8])
@pytest.mark.parametrize(("first", "second"), [(np, cupy), (cupy, np), (cupy, cupy)], ids=str)
def test_either_side_goes_on_where_the_other_was(first, second, size, tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", size)
    opt = stepped(first, 1, 2)
    opt.save(tmp_path / "run")
    later = stepped(second)
    later.load(tmp_path / "run")
    assert everything(later) == everything(opt)
    twin = stepped(np, 1, 2)
    twin.save(tmp_path / "twin")
    assert (tmp_path / "twin").read_bytes() == (tmp_path / "run").read_bytes()


@pytest.mark.parametrize("size", [16 << 20, 40])
@pytest.mark.parametrize(("first", "second"), [(np, cupy), (cupy, np), (cupy, cupy)], ids=str)
def test_either_side_goes_on_where_several_processes_of_the_other_were(first, second, size, tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", size)
    opt = stepped(first, 1, 2)
    cuts.save(tmp_path / "run", opt, 3)
    later = stepped(second)
    later.load(tmp_path / "run")
    assert everything(later) == everything(opt)


def test_one_piece_of_pinned_memory_serves_all(tmp_path, monkeypatch):
    taken, take = [], cupy.cuda.alloc_pinned_memory
    opt = stepped(cupy, 1)
    opt.save(tmp_path / "run")
    monkeypatch.setattr(cupy.cuda, "alloc_pinned_memory", lambda n: (taken.append(n), take(n))[1])
    opt.save(tmp_path / "run")
    assert taken == [pieces.PIECE]
    taken.clear()
    opt.load(tmp_path / "run")
    assert taken.count(pieces.PIECE) == 1


def test_work_on_any_stream_comes_before_a_save(tmp_path):
    opt, stream = stepped(cupy, 1), cupy.cuda.Stream(non_blocking=True)
    with stream:
        opt.step(arrays(cupy, 2))
    opt.save(tmp_path / "run")
    later = stepped(np)
    later.load(tmp_path / "run")
    assert everything(later) == everything(stepped(np, 1, 2))


def test_a_stream_that_is_captured_holds_no_file(tmp_path):
    opt, stream = stepped(cupy, 1), cupy.cuda.Stream(non_blocking=True)
    opt.save(tmp_path / "run")
    before = (tmp_path / "run").read_bytes()
    with stream:
        opt.step(arrays(cupy, 2))
        stream.begin_capture()
        try:
            with pytest.raises(RuntimeError, match="which can hold no checkpoint"):
                opt.save(tmp_path / "run")
            with pytest.raises(RuntimeError, match="which can hold no load"):
                opt.load(tmp_path / "run")
        finally:
            stream.end_capture()
    assert (tmp_path / "run").read_bytes() == before


def test_devices_share_a_file(tmp_path):
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs a second device")

    def made():
        here = cupy.ones(3, np.float32)
        with cupy.cuda.Device(1):
            return RMSProp({"a": here, "b": cupy.ones(5)}, momentum=0.9)

    opt = made()
    with cupy.cuda.Device(1):
        there = cupy.full(5, 0.5)
    opt.step({"a": cupy.full(3, 0.5, np.float32), "b": there})
    opt.save(tmp_path / "run")
    later = made()
    later.load(tmp_path / "run")
    assert [bits(x) for key in later.state for x in later.state[key].values()] == [
        bits(x) for key in opt.state for x in opt.state[key].values()
    ]
