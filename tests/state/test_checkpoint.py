"""Checkpoints: what was saved loads again, a file stays until the new one is complete, and mismatches are refused."""

import contextlib
import errno
import hashlib
import json
import os
import random
import signal
import stat
import sys
import threading
import time
import tracemalloc

import numpy as np
import pytest
import safetensors.numpy
from on_host import assert_same_bits, everything
from processes import run, start

from rmsprop_gpu import AdaGrad, RMSProp
from rmsprop_gpu.extras import MissingExtraError
from rmsprop_gpu.state import container, pieces, replacing
from rmsprop_gpu.state.buffers import State
from rmsprop_gpu.state.outcome import Outcome

EVERYTHING = {
    "momentum": 0.9,
    "centered": True,
    "use_ema": True,
    "global_clipnorm": float("inf"),
    "bias_correction": True,
}


def arrays(seed):
    """Arrays of every layout, with names that a path, a terminal or the format itself could misread."""
    rng = np.random.default_rng(seed)
    drawn = rng.standard_normal((4, 6, 5))
    return {
        "plain": drawn.astype(np.float32),
        "a/b": np.asfortranarray(drawn[0]),
        "transposed": drawn.astype(np.float32).transpose(2, 0, 1),
        "backwards": drawn[1].copy()[::-1],
        "half": drawn[2].astype(np.float16),
        "__metadata__": np.array(drawn[3, 0, 0]),
        "empty": np.zeros((0, 3), np.float32),
        "\u00fc\n\x1b": drawn[3].astype(np.float32),
    }


def build(**given):
    return RMSProp(arrays(0), **{**EVERYTHING, **given})


def trained(*seeds, **given):
    opt = build(**given)
    for seed in seeds:
        opt.step(arrays(seed))
    return opt


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.safetensors"


@pytest.fixture
def small(monkeypatch):
    """Shrink the pieces so that every array has several, some of them with more than one row."""
    monkeypatch.setattr(pieces, "PIECE", 40)


# Round trips


@pytest.mark.parametrize("size", [16 << 20, 40, 8])
def test_what_is_loaded_goes_on_on_the_same_bits(size, path, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", size)
    opt = trained(1, 2)
    opt.save(path)
    later = build(lr=0.5)
    assert later.load(path) == ([], [])
    for p, x in zip(later.param_groups[0]["params"], opt.param_groups[0]["params"], strict=True):
        p[...] = x
    for one in (opt, later):
        one.step(arrays(3))
    assert everything(later) == everything(opt)
    assert later.param_groups[0].items() >= {"lr": opt.lr, "global_clipnorm": float("inf")}.items()


def test_any_reader_of_the_format_finds_arrays_in_c_order(path, small):
    opt = trained(1)
    opt.save(path)
    read = safetensors.numpy.load_file(path)
    flat = opt.state_dict(flat=True)
    text = json.loads(flat.pop("rmsprop_gpu"))
    assert read.keys() == flat.keys()
    for name, x in flat.items():
        assert_same_bits(read[name], x)
        assert read[name].shape == x.shape
    with safetensors.safe_open(path, "numpy") as file:
        metadata = file.metadata()
    groups = json.loads(metadata.pop("param_groups"))
    assert groups == text["param_groups"]
    assert metadata == {
        "format": "rmsprop_gpu",
        "version": "1",
        "optimizer": "RMSProp",
        "steps": "1",
        "skipped_steps": "0",
    }


def test_each_array_begins_at_a_multiple_of_its_item(path):
    trained(1).save(path)
    head = header(path.read_bytes())
    assert all(
        x["data_offsets"][0] % (int(x["dtype"][1:]) // 8) == 0 for name, x in head.items() if name != "__metadata__"
    )


def header(data):
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def test_a_callable_rate_is_a_program_and_not_saved(path):
    opt = trained(1, lr=lambda step: 0.1)
    opt.save(path)
    with pytest.raises(ValueError, match="wanted a callable lr, as was saved"):
        build().load(path)
    later = build(lr=lambda step: 0.5)
    later.load(path)
    assert later.steps == 1


def test_not_strict_loads_what_both_have(path):
    trained(1).save(path)
    later = RMSProp({"plain": arrays(0)["plain"], "new": np.ones(3)}, momentum=0.9)
    missing, unexpected = later.load(path, strict=False)
    assert missing == ["new"]
    assert "a/b" in unexpected
    assert later.steps == 1


def test_what_was_assigned_since_the_last_step_is_saved(path):
    opt = RMSProp(np.ones(3))
    opt.param_groups[0]["momentum"] = 0.5
    opt.save(path)
    assert "0/momentum_buffer" in safetensors.numpy.load_file(path)


def test_progress_goes_from_the_first_piece_to_the_last(path, small):
    seen = []
    opt = trained(1)
    opt.save(path, progress=lambda done, total: seen.append((done, total)))
    assert {total for _, total in seen} == {opt.state.nbytes}
    done = [x for x, _ in seen]
    assert done == sorted(done)
    assert done[-1] == opt.state.nbytes
    assert len(seen) > 3 * len(arrays(0))


ELSEWHERE = """
import hashlib, sys
import numpy as np
from rmsprop_gpu import RMSProp
opt = RMSProp(np.ones(400_000, np.float32), momentum=0.9, clipnorm=1.0)
opt.load(PATH)
grad = np.random.default_rng(7).standard_normal(400_000).astype(np.float32)
opt.step(grad)
print(hashlib.sha256(b"".join(x.tobytes() for x in opt.state[0].values())).hexdigest())
"""


def test_another_process_with_other_threads_goes_on_on_the_same_bits(path):
    opt = RMSProp(np.ones(400_000, np.float32), momentum=0.9, clipnorm=1.0)
    opt.step(np.random.default_rng(6).standard_normal(400_000).astype(np.float32))
    opt.save(path)
    code = ELSEWHERE.replace("PATH", repr(str(path)))
    elsewhere = {run(code, NUMBA_NUM_THREADS=threads) for threads in ("1", "2")}
    opt.step(np.random.default_rng(7).standard_normal(400_000).astype(np.float32))
    assert elsewhere == {hashlib.sha256(b"".join(x.tobytes() for x in opt.state[0].values())).hexdigest()}


def test_a_head_of_any_length_is_none_of_another_kind(path):
    """The length of the header comes first, and 1,152 has the first bytes of a pickle."""
    seen = set()
    for n in range(1, 60):
        RMSProp({"w" * n: np.ones(1)}).save(path)
        seen.add(path.read_bytes()[:2])
        assert RMSProp({"w" * n: np.ones(1)}).load(path) == ([], [])
    assert seen & {bytes([0x80, protocol]) for protocol in (2, 3, 4, 5)}


# The file


def test_what_fails_leaves_the_file_as_it_was(path, small):
    trained(1).save(path)
    before = path.read_bytes()

    def fail(done, total):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        trained(1, 2).save(path, progress=fail)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_what_a_killed_save_left_is_taken_over(path):
    path.with_name(path.name + replacing.SUFFIX).write_bytes(b"x" * 1_000_000)
    trained(1).save(path)
    assert list(path.parent.iterdir()) == [path]
    assert build().load(path) == ([], [])


def test_two_threads_do_not_save_to_one_file_at_a_time(path):
    first, second, errors = trained(1), trained(1, 2), []

    def save():
        try:
            second.save(path)
        except RuntimeError as error:
            errors.append(str(error))

    def again(done, total):
        if not errors:
            thread = threading.Thread(target=save)
            thread.start()
            thread.join()

    first.save(path, progress=again)
    assert len(errors) == 1
    assert "is writing to run.safetensors.saving; nothing was changed" in errors[0]
    later = build()
    later.load(path)
    assert later.steps == 1
    second.save(path)
    later.load(path)
    assert later.steps == 2


def test_a_handler_saves_to_the_file_that_is_being_saved(path):
    opt, seen = trained(1), []

    def handler(number, frame):
        opt.save(path)
        assert build().load(path) == ([], [])

    def progress(done, total):
        if not seen:
            seen.append(done)
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, handler)
    try:
        opt.save(path, progress=progress)
    finally:
        signal.signal(signal.SIGINT, before)
    assert build().load(path) == ([], [])
    assert list(path.parent.iterdir()) == [path]


def test_data_are_on_the_disk_before_they_have_the_name(path, monkeypatch):
    monkeypatch.setattr(container, "SETTLED", 200)
    calls = []
    for name in ("fdatasync", "fsync", "replace", "chmod", "posix_fallocate"):
        real = getattr(os, name)

        def spy(*args, name=name, real=real):
            at = args[0] if isinstance(args[0], int) else None
            calls.append(f"{name} the folder" if at is not None and stat.S_ISDIR(os.fstat(at).st_mode) else name)
            return real(*args)

        monkeypatch.setattr(os, name, spy)
    trained(1).save(path)
    assert calls[0] == "posix_fallocate"
    assert calls[-4:] == ["chmod", "fsync", "replace", "fsync the folder"]
    assert set(calls[1:-4]) == {"fdatasync"}
    assert build().load(path) == ([], [])


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSPC])
def test_a_disk_that_is_full_says_so_and_one_that_cannot_tell_does_not(number, path, monkeypatch):
    trained(1).save(path)

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    if number == errno.ENOSPC:
        with pytest.raises(OSError, match="No space left"):
            trained(1, 2).save(path)
    else:
        trained(1, 2).save(path)
    later = build()
    later.load(path)
    assert later.steps == (1 if number == errno.ENOSPC else 2)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(("mode", "mask"), [(0o444, 0o022), (None, 0o027), (0o600, 0o000)])
def test_permissions_are_those_of_the_file_or_of_a_new_one(mode, mask, path):
    if mode is not None:
        trained(1).save(path)
        path.chmod(mode)
    seen = []
    before = os.umask(mask)
    try:
        trained(1).save(path, progress=lambda *_: seen.append(beside(path).stat().st_mode & 0o777))
    finally:
        os.umask(before)
    assert set(seen) == {0o600}  # nobody else can read what is written
    assert path.stat().st_mode & 0o777 == (0o666 & ~mask if mode is None else mode)


def beside(path):
    return path.with_name(path.name + replacing.SUFFIX)


def test_what_is_no_file_is_not_replaced(path):
    os.mkfifo(path)
    with pytest.raises(OSError, match="is not a regular file"):
        build().save(path)
    assert stat.S_ISFIFO(path.stat().st_mode)


def test_a_file_that_is_replaced_while_it_is_opened_is_opened_again(path, monkeypatch):
    trained(1).save(path)
    real, turns = os.path.samestat, iter([False, False])
    monkeypatch.setattr(os.path, "samestat", lambda a, b: next(turns, None) is None and real(a, b))
    later = build()
    later.load(path)
    assert later.steps == 1


def test_a_path_of_bytes_is_one(path):
    trained(1).save(os.fsencode(path))
    assert build().load(os.fsencode(path)) == ([], [])


def test_a_link_is_followed_and_permissions_are_kept(path, tmp_path):
    there = tmp_path / "elsewhere"
    there.mkdir()
    real = there / "real.safetensors"
    trained(1).save(real)
    real.chmod(0o640)
    path.symlink_to(real)
    trained(1, 2).save(path)
    assert path.is_symlink()
    assert real.stat().st_mode & 0o777 == 0o640
    later = build()
    later.load(real)
    assert later.steps == 2


@pytest.mark.parametrize(("where", "error"), [("", IsADirectoryError), ("no/such/file", FileNotFoundError)])
def test_where_nothing_can_be_written_the_system_says_so(where, error, tmp_path):
    with pytest.raises(error):
        build().save(tmp_path / where)
    assert list(tmp_path.iterdir()) == []


# A save is atomic


def test_nothing_steps_while_it_is_saved(path):
    opt = trained(1)
    before = everything(opt)

    def step(done, total):
        with pytest.raises(RuntimeError, match="a step was requested"):
            opt.step(arrays(2))

    opt.save(path, progress=step)
    assert everything(opt) == before
    opt.step(arrays(2))
    later = build()
    later.load(path)
    assert later.steps == 1


def test_a_handler_within_a_step_saves_a_whole_one(path):
    """The schedule is called within the step, so on this very thread."""
    saved = []

    def rate(step):
        if step == 1:
            opt.save(path)
            saved.append(everything(opt))
        return 0.1

    opt = build(lr=rate)
    opt.step(arrays(1))
    opt.step(arrays(2))
    later = build(lr=rate)
    later.load(path)
    assert (later.steps, opt.steps) == (1, 2)


def test_a_handler_within_a_step_saves_what_the_next_one_needs_too(path):
    """The schedule assigns a setting that needs another buffer, and saves before that buffer exists."""

    def rate(step):
        if step == 1:
            opt.param_groups[0]["momentum"] = 0.9
            opt.param_groups[0]["use_ema"] = True
            opt.save(path)
            kept.append(opt.state_dict())
        return 0.1

    kept, opt = [], RMSProp({"w": np.ones(3, np.float16)}, lr=rate)
    for _ in range(2):
        opt.step({"w": np.ones(3, np.float16)})
    for load in (lambda later: later.load(path), lambda later: later.load_state_dict(kept[0])):
        later = RMSProp({"w": np.ones(3, np.float16)}, lr=rate)
        load(later)
        assert later.state["w"]["momentum_buffer"].tolist() == [0, 0, 0]
        assert later.state["w"]["ema"].dtype == np.float32


def test_a_handler_within_a_load_saves_nothing(path, monkeypatch):
    opt, errors, read = trained(1), [], pieces.Host.read
    opt.save(path)

    def reading(self, file, piece):
        if not errors:
            with pytest.raises(RuntimeError, match="a save was requested") as caught:
                opt.save(path.with_name("torn"))
            errors.append(caught.value)
        read(self, file, piece)

    monkeypatch.setattr(pieces.Host, "read", reading)
    opt.load(path)
    assert errors
    assert not path.with_name("torn").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError])
def test_a_load_that_is_cut_off_has_to_be_done_again(error, path, monkeypatch):
    trained(1, 2).save(path)
    good, opt, count, read = path.read_bytes(), trained(1), iter(range(100)), pieces.Host.read

    def cut(self, file, piece):
        if next(count) == 3:
            raise error
        read(self, file, piece)

    with monkeypatch.context() as patch:
        patch.setattr(pieces.Host, "read", cut)
        with pytest.raises(RuntimeError if error is OSError else error):
            opt.load(path)
    for refused in (lambda: opt.step(arrays(2)), lambda: opt.save(path), opt.state_dict):
        with pytest.raises(RuntimeError, match=r"is loaded in part .*: load it again before anything else"):
            refused()
    assert path.read_bytes() == good
    opt.load(path)
    opt.step(arrays(3))
    assert opt.steps == 3


def test_a_load_that_is_cut_off_between_state_and_numbers_has_to_be_done_again(path, monkeypatch):
    trained(1, 2).save(path)
    opt = trained(1)

    def cut(self, skipped):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Outcome, "load", cut)
        with pytest.raises(KeyboardInterrupt):
            opt.load(path)
    with pytest.raises(RuntimeError, match="load it again before anything else"):
        opt.step(arrays(2))
    opt.load(path)
    assert opt.steps == 2


def test_a_load_that_gets_no_memory_leaves_an_optimizer_that_steps(path, monkeypatch):
    trained(1, 2).save(path)
    opt = trained(1)
    before = everything(opt)

    def full(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(State, "ensure", full)
        with pytest.raises(MemoryError):
            opt.load(path)
    assert everything(opt) == before
    opt.step(arrays(2))


def test_another_thread_does_not_save_half_a_step(path):
    errors = []

    def other():
        try:
            opt.save(path)
        except RuntimeError as error:
            errors.append(str(error))

    def rate(step):
        if step == 1:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
        return 0.1

    opt = build(lr=rate)
    opt.step(arrays(1))
    opt.step(arrays(2))
    assert len(errors) == 1
    assert "a save was requested" in errors[0]
    assert not path.exists()
    opt.save(path)


# Mismatches


def test_every_difference_is_said_at_once(path):
    trained(1).save(path)
    other = {**arrays(0), "plain": np.ones((3, 3), np.float32), "half": np.ones((6, 5)), "more": np.ones(2)}
    del other["empty"]
    opt = RMSProp(other, **EVERYTHING)
    before = everything(opt)
    with pytest.raises((TypeError, ValueError)) as caught:
        opt.load(path)
    said = str(caught.value)
    for part in (
        '"more" is missing',
        '"empty" has no parameter here',
        "has shape (4, 6, 5); wanted (3, 3)",
        "wanted float64",
    ):
        assert part in said
    assert everything(opt) == before
    adagrad = AdaGrad(arrays(0))
    with pytest.raises(ValueError, match="wanted 'AdaGrad'"):
        adagrad.load(path)


def damaged(**changes):
    """A valid file with other metadata."""

    def make(data, path):
        head = header(data)
        head["__metadata__"].update(changes)
        text = json.dumps(head).encode()
        size = int.from_bytes(data[:8], "little")
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])

    return make


def negative(data, path):
    """Make the last element of an average of squares negative."""
    size, head = int.from_bytes(data[:8], "little"), header(data)
    at = 8 + size + head["plain/square_avg"]["data_offsets"][1] - 4
    path.write_bytes(data[:at] + np.float32(-1).tobytes() + data[at + 4 :])


def foreign(data, path):
    safetensors.numpy.save_file({"a/square_avg": np.ones(3)}, path)


def halves(data, path):
    metadata = {"format": "rmsprop_gpu", "version": "1"}
    safetensors.numpy.save_file({"a/square_avg": np.ones(3, np.float16)}, path, metadata=metadata)


def slashless(data, path):
    metadata = {"format": "rmsprop_gpu", "version": "1"}
    safetensors.numpy.save_file({"square_avg": np.ones(3)}, path, metadata=metadata)


FILES = {
    "is empty": lambda data, path: path.write_bytes(b""),
    "a zip file, as torch.save": lambda data, path: path.write_bytes(b"PK\x03\x04" + data),
    "a pickle, which is not opened": lambda data, path: path.write_bytes(b"\x80\x04K\x01."),
    "an npy file": lambda data, path: path.write_bytes(b"\x93NUMPY" + data),
    "is damaged, cut off": lambda data, path: path.write_bytes(data[:-1]),
    "is damaged, cut off, or not a safetensors": lambda data, path: path.write_bytes(b"a text that somebody wrote"),
    "not a checkpoint of rmsprop_gpu": foreign,
    "has version 2, and this package reads 1: it was written by a newer one": damaged(version="2"),
    "has version 'x', and this package reads 1: it is damaged": damaged(version="x"),
    r"cannot be state, by their dtypes or names: 'a/square_avg' \(F16\)": halves,
    r"cannot be state, by their dtypes or names: 'square_avg', which has no slash": slashless,
    "its param_groups are not JSON": damaged(param_groups="[{"),
    r"\"steps\"\] is 'many'; wanted a count": damaged(steps="many"),
    "elements below 0": negative,
    "lacks 'alpha'": damaged(param_groups=json.dumps([{"params": list(arrays(0))}])),
    r"\"param_groups\"\] is ": damaged(param_groups="7"),
}


@pytest.mark.parametrize("said", FILES)
def test_a_file_is_named_as_what_it_is(said, path, small):
    trained(1).save(path)
    FILES[said](path.read_bytes(), path)
    opt = trained(1, 2)
    before = everything(opt)
    with pytest.raises((TypeError, ValueError), match=said):
        opt.load(path)
    assert everything(opt) == before


@pytest.mark.parametrize(
    ("name", "longest", "said"),
    [
        ("\ud800w", 10_000, "is in a name or a group and is not valid Unicode"),
        ("w" * 60, 200, r"names, shapes and groups take .* bytes; wanted at most 200"),
    ],
    ids=["name", "length"],
)
def test_what_could_not_be_loaded_is_not_saved(name, longest, said, path, monkeypatch):
    monkeypatch.setattr(container, "LONGEST_HEAD", longest)
    opt = RMSProp({name: np.ones(2)})
    with pytest.raises(ValueError, match=said):
        opt.save(path)
    assert list(path.parent.iterdir()) == []


def test_adagrad_is_kept_too(path):
    opt = AdaGrad(arrays(0))
    opt.step(arrays(1))
    opt.save(path)
    later = AdaGrad(arrays(0))
    later.load(path)
    for one in (opt, later):
        one.step(arrays(2))
    for key in opt.state:
        assert_same_bits(later.state[key]["sum"], opt.state[key]["sum"])


def test_a_file_that_becomes_shorter_while_it_is_read_says_so(path, monkeypatch):
    trained(1).save(path)
    opt, read = trained(1, 2), pieces.Host.read

    def shorten(self, file, piece):
        os.truncate(path, path.stat().st_size - 1)
        read(self, file, piece)

    monkeypatch.setattr(pieces.Host, "read", shorten)
    with pytest.raises(RuntimeError, match=r"loaded in part .*the file ends before its last array"):
        opt.load(path)


def test_without_the_library_the_extra_is_named(path, monkeypatch):
    trained(1).save(path)  # saving does not need it
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(MissingExtraError, match="the extra safetensors"):
        build().load(path)


# Mutations and kills


def mutated(data, rng):
    """A file with some bytes changed, mostly in its header, or cut short, or extended."""
    data, size = bytearray(data), 8 + int.from_bytes(data[:8], "little")
    way = rng.random()
    if way < 0.1:
        return bytes(data[: rng.randrange(len(data))])
    if way < 0.15:
        return bytes(data) + rng.randbytes(rng.randrange(1, 100))
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(size if rng.random() < 0.8 else len(data))
        data[at] = rng.choice([rng.randrange(256), *b'0123456789"{}[],:'])
    return bytes(data)


def survive(path, count, seed):
    """Load `count` mutated files. Each either loads, or is refused and changes nothing. Returns how many loaded."""
    trained(1).save(path)
    good, rng, loaded = path.read_bytes(), random.Random(seed), 0
    opt = trained(1, 2)
    before = everything(opt)
    for _ in range(count):
        path.write_bytes(mutated(good, rng))
        try:
            opt.load(path)
        except (TypeError, ValueError):
            assert everything(opt) == before
        else:
            loaded += 1
            opt = trained(1, 2)
    return loaded


def test_mutated_files_are_refused_or_loaded(path):
    assert survive(path, 300, 1) < 150


def test_what_is_read_takes_no_memory_for_a_second_file(path):
    """Loading never needs more than twice the size of the file, whatever its header says."""
    opt = RMSProp(np.ones(1_500_000, np.float64), momentum=0.9)
    opt.save(path)
    good, rng = path.read_bytes(), random.Random(3)
    tracemalloc.start()
    try:
        for i in range(20):
            path.write_bytes(mutated(good, rng) if i else good)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            with contextlib.suppress(TypeError, ValueError):
                opt.load(path)
            assert tracemalloc.get_traced_memory()[1] - before < 2 * len(good)
    finally:
        tracemalloc.stop()


@pytest.mark.exhaustive
def test_ten_thousand_mutated_files_are_refused_or_loaded(path):
    loaded = survive(path, 10_000, 2)
    print(f"10,000 mutated files: {loaded} loaded, {10_000 - loaded} refused")


SAVING = """
import sys
import numpy as np
from rmsprop_gpu import RMSProp
opt = RMSProp({"w": np.ones(2_000_000, np.float32)}, momentum=0.9)
grad = np.ones(2_000_000, np.float32)
opt.step({"w": grad})
print("ready", flush=True)
while True:
    opt.save(sys.argv[1] if len(sys.argv) > 1 else PATH)
    opt.step({"w": grad})
"""


def kill(path, times, seed):
    """Kill a program that saves in a loop, `times` times at random moments. The file must load each time."""
    rng, steps = random.Random(seed), []
    code = SAVING.replace("sys.argv[1] if len(sys.argv) > 1 else PATH", repr(str(path)))
    for _ in range(times):
        process = start(code)
        assert process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.02, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        process.stderr.close()
        opt = RMSProp({"w": np.ones(2_000_000, np.float32)}, momentum=0.9)
        if path.exists():
            opt.load(path)
            steps.append(opt.steps)
            assert opt.steps >= 1
            assert float(opt.state["w"]["momentum_buffer"][0]) > 0
        assert set(path.parent.iterdir()) <= {path, path.with_name(path.name + replacing.SUFFIX)}
    assert steps
    return steps


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_killed_save_leaves_a_file_that_loads(path):
    kill(path, 3, 1)


@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_two_hundred_killed_saves_leave_files_that_load(path):
    steps = kill(path, 200, 2)
    print(f"200 saves killed: {len(steps)} files, of {min(steps)} to {max(steps)} steps, all loaded")


# The command line


def test_inspect_says_what_is_in_it(path, capsys):
    from rmsprop_gpu.cli import main

    trained(1).save(path)
    assert main(["inspect", str(path)]) == 0
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert lines[:2] == ["RMSProp, version 1", "steps: 1, 0 of them skipped"]
    assert "group 0, parameters: 8" in lines
    assert any(line.split() == ["momentum", "0.9"] for line in lines)
    assert any(
        line.split("  ")[0] == "plain/square_avg" and "float32" in line and "(4, 6, 5)" in line for line in lines
    )
    assert "\x1b" not in said


def test_inspect_speaks_to_no_terminal(path, capsys):
    from rmsprop_gpu.cli import main

    trained(1).save(path)
    damaged(steps="\x1b[2J", optimizer="\x1b[1m")(path.read_bytes(), path)
    assert main(["inspect", str(path)]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_inspect_refuses_what_is_no_checkpoint(path, capsys):
    from rmsprop_gpu.cli import main

    path.write_bytes(b"PK\x03\x04...")
    assert main(["inspect", str(path)]) == 1
    assert "a zip file" in capsys.readouterr().err
    assert main(["inspect", str(path) + "x"]) == 1
    assert "No such file" in capsys.readouterr().err
