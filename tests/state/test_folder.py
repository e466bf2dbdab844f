"""Checkpoints that are folders: what any number of processes saved, one process loads whole or refuses by name."""

import errno
import json
import os
import random
import signal
import sys
import time
import tracemalloc
from pathlib import Path

import cuts
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from on_host import assert_same_bits, everything
from processes import start

from rmsprop_gpu import AdaGrad, RMSProp
from rmsprop_gpu.cli import main
from rmsprop_gpu.state import checkpoint, folder, index, pieces, replacing

EVERYTHING = {"momentum": 0.9, "centered": True, "use_ema": True, "bias_correction": True}
ALIKE = "step-00000001-0123abcd-rank-00000.safetensors"


def arrays(seed):
    """Arrays of every layout, with names that look like parts, or that a terminal or the format could misread."""
    drawn = np.random.default_rng(seed).standard_normal((4, 6, 5))
    return {
        "plain": drawn.astype(np.float32),
        "a/b": np.asfortranarray(drawn[0]),
        "plain[0:3]": drawn.astype(np.float32).transpose(2, 0, 1),
        "[]/w[1:2]": drawn[1].copy()[::-1],
        "half/step": drawn[2].astype(np.float16),
        "__metadata__": np.array(drawn[3, 0, 0]),
        "empty": np.zeros((0, 3), np.float32),
        "\u00fc\n\x1b": drawn[3].astype(np.float32),
    }


def build(kind=RMSProp):
    return kind(arrays(0), **(EVERYTHING if kind is RMSProp else {"use_ema": True}))


def trained(*seeds, kind=RMSProp):
    opt = build(kind)
    for seed in seeds:
        opt.step(arrays(seed))
    return opt


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def saved(path):
    """A checkpoint after one step, saved by two processes."""
    cuts.save(path, trained(1), 2)
    return path


def files(path):
    return sorted(file for file in path.iterdir() if file.name != index.NAME)


def read_index(path):
    return json.loads((path / index.NAME).read_text())


def changed(path, change):
    """Apply `change` to the index and write it back."""
    content = read_index(path)
    change(content)
    (path / index.NAME).write_text(json.dumps(content))


# Round trips


@pytest.mark.parametrize("size", [16 << 20, 40])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 40])
@pytest.mark.parametrize("kind", [RMSProp, AdaGrad])
def test_one_process_goes_on_where_several_were(kind, ranks, size, path, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", size)
    opt, later = trained(1, 2, kind=kind), build(kind)
    cuts.save(path, opt, ranks)
    assert len(files(path)) == ranks
    assert later.load(path) == ([], [])
    for p, x in zip(cuts.params(later).values(), cuts.params(opt).values(), strict=True):
        p[...] = x
    for one in (opt, later):
        one.step(arrays(3))
    assert everything(later) == everything(opt)


def test_parts_are_called_by_the_elements_of_the_whole_tensor(saved):
    read = {name: x for file in files(saved) for name, x in safetensors.numpy.load_file(file).items()}
    x = trained(1).state["a/b"]["square_avg"].ravel()
    of_it = {name: y for name, y in read.items() if name.startswith("a/b/square_avg")}
    assert list(of_it) == ["a/b/square_avg[0:30]"]
    assert_same_bits(of_it["a/b/square_avg[0:30]"], x)
    halves = sorted(name for name in read if name.startswith("plain[0:3]/grad_avg"))
    assert len(halves) == 2
    start, stop = (int(n) for n in halves[1].partition("grad_avg[")[2][:-1].split(":"))
    assert_same_bits(read[halves[1]], trained(1).state["plain[0:3]"]["grad_avg"].ravel()[start:stop])
    assert read["__metadata__/step"].shape == ()


def test_a_process_without_parts_has_a_file(path):
    opt = RMSProp(np.ones(2))
    cuts.save(path, opt, 4)
    assert [len(safetensors.numpy.load_file(file)) for file in files(path)] == [0, 3, 0, 1]
    later = RMSProp(np.ones(2))
    assert later.load(path) == ([], [])


def test_ranges_of_one_process_may_lie_between_those_of_another(path):
    x = np.arange(10.0)
    names = [folder.file_name(3, "0123abcd", rank) for rank in (0, 1)]
    of_all = [(0, 3), (1, 1), (3, 3), (3, 4), (4, 9), (9, 10)]
    listed = {}
    for rank, name in enumerate(names):
        mine = [cuts.part("w", "sum", a, b, x[a:b]) for a, b in of_all[rank::2][::-1]]
        mine += [cuts.part("w", "step", None, None, np.array(3))] * rank
        listed[name] = folder.write_file(path, name, mine)
    opt = AdaGrad({"w": np.ones((5, 2))})
    folder.write_index(path, {**cuts.frame(opt), "steps": 3}, cuts.tensors(opt), listed)
    opt.load(path)
    assert opt.steps == opt.state["w"]["step"] == 3
    assert_same_bits(opt.state["w"]["sum"], x.reshape(5, 2))


@pytest.mark.parametrize("one_file", [True, False])
def test_some_elements_are_read_without_the_others(one_file, path, monkeypatch):
    opt = trained(1)
    want = opt.state["plain"]["square_avg"].ravel()
    opt.save(path) if one_file else cuts.save(path, opt, 3)
    monkeypatch.setattr(pieces, "PIECE", 40)
    with checkpoint.opened(path) as content:
        whole = content["state"]["plain"]["square_avg"]
        for start, stop in [(0, 120), (7, 100), (119, 120), (50, 50)]:
            got = np.empty(stop - start, np.float32)
            read = whole.part(start, stop)
            assert (read.shape, read.dtype) == (got.shape, got.dtype)
            read.read_into(got)
            assert_same_bits(got, want[start:stop])
            assert_same_bits(np.concatenate([got[:0], *(x.copy() for x in read.values())]), want[start:stop])
            assert read.part(3, 5).offset == whole.offset + 4 * (start + 3)


# The folder


def test_the_files_of_the_save_before_go_and_nothing_else_does(saved):
    left = [saved / (files(saved)[0].name + replacing.SUFFIX), saved / (index.NAME + 2 * replacing.SUFFIX)]
    others = [saved / name for name in ("notes.txt", "step-1.safetensors", "x" + ALIKE, ALIKE + ".bak")]
    for file in left + others:
        file.write_bytes(b"x")
    (saved / ALIKE).mkdir()
    link = saved / ALIKE.replace("rank-00000", "rank-00001")
    link.symlink_to(others[0])
    before = files(saved)
    cuts.save(saved, trained(1, 2), 3)
    assert {*files(saved)} & {*before} == {*others, saved / ALIKE, link}
    assert len(files(saved)) == 3 + 6
    later = build()
    later.load(saved)
    assert later.steps == 2


def test_files_without_an_index_change_nothing(saved):
    cuts.write_files(saved, trained(1, 2), 4)
    later = build()
    later.load(saved)
    assert later.steps == 1
    listed = set(read_index(saved)["files"])
    folder.remove(saved, lambda name: name not in listed)
    assert {file.name for file in files(saved)} == listed


def test_two_saves_of_one_step_have_no_file_in_common(path):
    names = []
    for _ in range(2):
        cuts.save(path, trained(1), 2)
        names += files(path)
    assert len({*names}) == 4
    assert folder.file_name(1200, "1f3a9c2e", 3) == "step-00001200-1f3a9c2e-rank-00003.safetensors"
    for steps in (0, 10**9):
        assert index.FILE.fullmatch(folder.file_name(steps, folder.new_token(), 10**6))


def test_the_index_is_on_the_disk_behind_the_files_and_before_any_goes(saved, monkeypatch):
    calls = []
    for name in ("fsync", "replace", "unlink"):
        real = getattr(os, name)

        def spy(*args, name=name, real=real):
            calls.append(f"{name} {Path(args[-1]).name}" if name != "fsync" else name)
            return real(*args)

        monkeypatch.setattr(os, name, spy)
    before = [file.name for file in files(saved)]
    cuts.save(saved, trained(1, 2), 2)
    now = [file.name for file in files(saved)]
    assert calls[:3] == ["fsync", f"replace {now[0]}", "fsync"]
    assert calls[3:6] == ["fsync", f"replace {now[1]}", "fsync"]
    assert calls[6:9] == ["fsync", f"replace {index.NAME}", "fsync"]
    assert sorted(calls[9:]) == [f"unlink {name}" for name in before]


@pytest.mark.parametrize("at", ["file", "index"])
def test_a_save_that_fails_leaves_the_checkpoint_that_was(at, saved, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = {file: file.read_bytes() for file in saved.iterdir()}
    written = {} if at == "file" else cuts.write_files(saved, trained(1, 2), 2)
    monkeypatch.setattr(os, "posix_fallocate", full)
    opt = trained(1, 2)
    write = {
        "file": lambda: cuts.write_files(saved, opt, 2),
        "index": lambda: folder.write_index(saved, cuts.frame(opt), cuts.tensors(opt), written),
    }
    with pytest.raises(OSError, match="No space left"):
        write[at]()
    assert {file: file.read_bytes() for file in before} == before
    later = build()
    later.load(saved)
    assert later.steps == 1


def test_a_folder_is_made_or_the_system_says_why_not(path):
    opt = RMSProp(np.ones(2))
    path.write_bytes(b"a file")
    with pytest.raises(NotADirectoryError, match="is not a folder"):
        cuts.save(path, opt, 1)
    assert path.read_bytes() == b"a file"
    with pytest.raises(FileNotFoundError):
        cuts.save(path.parent / "no" / "such", opt, 1)
    with pytest.raises(FileNotFoundError):
        build().load(path.parent / "no")
    with pytest.raises(IsADirectoryError):
        opt.save(path.parent)


def test_folders_of_bytes_and_texts_are_ones(path):
    cuts.save(os.fsencode(path), trained(1), 2)
    assert build().load(str(path)) == build().load(os.fsencode(path)) == ([], [])


# Only complete files are written


X = np.ones(4, np.float32)
WHOLE = {
    "step": cuts.part("w", "step", None, None, np.array(1)),
    "bias": cuts.part("w", "bias_weight", None, None, np.array(1, np.float32)),
    "first": cuts.part("w", "square_avg", 0, 4, X),
    "last": cuts.part("w", "square_avg", 4, 8, X),
}
UNWHOLE = {
    "'w/square_avg' lacks its elements 0 to 4 of 8": {"first": None},
    "'w/square_avg' lacks its elements 4 to 8 of 8": {"last": None},
    "'w/square_avg' lacks its elements 4 to 5 of 8": {"last": cuts.part("w", "square_avg", 5, 8, X[:3])},
    f"'w/square_avg[0:4]' in {ALIKE} and 'w/square_avg[3:7]' in {ALIKE} overlap": {
        "last": cuts.part("w", "square_avg", 3, 7, X)
    },
    f"'w/square_avg[0:4]' in {ALIKE} and 'w/square_avg[2:3]' in {ALIKE} overlap": {
        "more": cuts.part("w", "square_avg", 2, 3, X[:1])
    },
    f"'w/square_avg[4:9]' in {ALIKE} is not a range of its 8 elements": {
        "last": cuts.part("w", "square_avg", 4, 9, np.ones(5))
    },
    f"'v/step' in {ALIKE} belongs to none of the tensors": {"more": cuts.part("v", "step", None, None, np.array(1))},
    "is not a part of a step; wanted no range": {"step": cuts.part("w", "step", 0, 1, X[:1])},
    "is not a part of a sum; wanted a range": {"more": cuts.part("w", "sum", None, None, np.array(1.0))},
    f"'w/a[b' in {ALIKE} is not the name of a part": {"more": cuts.part("w", "a[b", None, None, np.array(1.0))},
    "no part of 'w' is there": dict.fromkeys(WHOLE),
}


@pytest.mark.parametrize("said", UNWHOLE)
def test_no_index_is_written_of_what_is_no_whole_state(said, path):
    opt = RMSProp({"w": np.ones((2, 4), np.float32)})
    given = [part for part in {**WHOLE, **UNWHOLE[said]}.values() if part is not None]
    listed = {ALIKE: folder.write_file(path, ALIKE, given)}
    with pytest.raises(ValueError, match="nothing was changed") as error:
        folder.write_index(path, cuts.frame(opt), cuts.tensors(opt), listed)
    assert said in str(error.value)
    assert [file.name for file in path.iterdir()] == [ALIKE]


def test_what_two_files_have_is_refused(path):
    opt, other = RMSProp({"w": np.ones((2, 4), np.float32)}), ALIKE.replace("rank-00000", "rank-00001")
    listed = {name: folder.write_file(path, name, WHOLE.values()) for name in (ALIKE, other)}
    with pytest.raises(ValueError, match=f"'w/step' in {other} is in {ALIKE} too"):
        folder.write_index(path, cuts.frame(opt), cuts.tensors(opt), listed)


def test_a_file_that_another_process_sees_and_this_does_not_is_named(saved):
    opt, before = trained(1, 2), (saved / index.NAME).read_bytes()
    listed = cuts.write_files(saved, opt, 3)
    gone = list(listed)[1]
    (saved / gone).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {gone}.*wanted one folder for all processes"):
        folder.write_index(saved, cuts.frame(opt), cuts.tensors(opt), listed)
    assert (saved / index.NAME).read_bytes() == before


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        (ALIKE, [cuts.part("w", "sum", 0, 3, X)], r"'w/sum\[0:3\]' has shape \(4,\); wanted \(3,\)"),
        (ALIKE, [cuts.part("w", "step", None, None, X)], r"'w/step' has shape \(4,\); wanted \(\)"),
        (ALIKE, [WHOLE["step"]] * 2, "'w/step' is there twice; wanted each part once"),
        (ALIKE, [cuts.part("\ud800", "sum", 0, 4, X)], "is not valid Unicode"),
        ("../" + ALIKE, [], "is not the name of a process"),
        ("run", [], "is not the name of a process"),
    ],
)
def test_a_file_that_would_not_load_is_not_written(name, given, said, path):
    with pytest.raises(ValueError, match=said):
        folder.write_file(path, name, given)
    assert not path.exists() or not list(path.iterdir())


# Only complete checkpoints are read


def put(value, *keys):
    """Set a value in the index, at the place that `keys` name."""

    def change(content):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return lambda path: changed(path, change)


def raw(text):
    return lambda path: (path / index.NAME).write_bytes(text)


def without(what):
    return lambda path: (path / (what if isinstance(what, str) else files(path)[what].name)).unlink()


def unlisted(path):
    changed(path, lambda content: next(iter(content["files"].values())).pop())


def listed(name):
    """List a part that the first file does not contain."""
    return lambda path: changed(path, lambda content: content["files"][files(path)[0].name].append(name))


def renamed(path):
    """Replace a file by one of another save with the same parts."""
    other = path.with_name("other")
    cuts.save(other, trained(1, 2), 2)
    files(other)[1].replace(files(path)[1])


def shortened(path):
    """Remove an element from a part, so that it is shorter than its name says."""
    rewritten(path, lambda name, x: x[:-1] if name.startswith("plain/square_avg") else x)


def widened(path):
    rewritten(path, lambda name, x: x.astype(np.float64) if name.startswith("plain/square_avg") else x)


def rewritten(path, change):
    file = files(path)[0]
    content = {name: change(name, x) for name, x in safetensors.numpy.load_file(file).items()}
    metadata = {"format": "rmsprop_gpu part", "version": "1", "file": file.name}
    safetensors.numpy.save_file(content, file, metadata=metadata)


def whole_file(path):
    trained(1).save(files(path)[0])


def cut_off(path):
    os.truncate(files(path)[1], files(path)[1].stat().st_size - 1)


def first(path):
    return files(path)[0].name


ONE = {"w": {"dtype": "float32", "shape": [2, 4]}}
DAMAGED = {
    "has no index.json, which a save writes last": without(index.NAME),
    "index.json' is not JSON": raw(b"{"),
    "index.json' is not JSON (Exp": raw(b""),
    "index.json' is not JSON ('utf-8' codec": raw(b'"\xff"'),
    "index.json' is not JSON (maximum recursion": raw(b"[" * 100_000),
    "index.json' is JSON, but not an index of rmsprop_gpu": raw(b"[]"),
    "is JSON, but not an index of rmsprop_gpu; wanted": put("rmsprop_gpu", "format"),
    "has version 2, and this package reads 1: it was written by a newer one": put(2, "version"),
    "has version '1', and this package reads 1: it is damaged": put("1", "version"),
    "its tensors are not a dtype and a shape each": put({"w": []}, "tensors"),
    "its tensors are not a dtype and": put({"w": {"dtype": ["float32"], "shape": []}}, "tensors"),
    "its tensors are not a dtype": put({"w": {"dtype": "float32", "shape": [True]}}, "tensors"),
    "its tensors are not a": put({"w": {"dtype": "float32", "shape": [-1]}}, "tensors"),
    "its tensors are not": put({"w": {"dtype": "float32", "shape": [1] * 65}}, "tensors"),
    "its files are not a list of parts each": put({ALIKE: [1]}, "files"),
    "names files that no save writes: '../x'": put([], "files", "../x"),
    f"names files that no save writes: 'a/{ALIKE}'": put([], "files", f"a/{ALIKE}"),
    f"names files that no save writes: '{ALIKE}\\n'": put([], "files", ALIKE + "\n"),
    f"lacks {ALIKE}, which its index.json names": put([], "files", ALIKE),
    "rank-00001.safetensors, which its index.json names": without(1),
    "'plain/sum[0:120]' is not in step-": listed("plain/sum[0:120]"),
    "is not the name of a part": listed("plain/sum[00:120]"),
    "lacks its elements 0 to 120 of 120": listed("plain/sum[120:120]"),
    "belongs to none of the tensors": listed("v/step"),
    "is in step-": lambda path: changed(path, lambda content: content["files"].__setitem__(ALIKE, ["plain/step"])),
    "no part of 'w' is there": put({"dtype": "float32", "shape": [2, 4]}, "tensors", "w"),
    "is not a range of its 119 elements": put([119], "tensors", "plain", "shape"),
    "lacks its elements 120 to 1606938044258990275541962092341162602522202993782792835301376 of": put(
        [2**50] * 4, "tensors", "plain", "shape"
    ),
    "is not in the index": unlisted,
    "was written as 'step-": renamed,
    "has shape (119,); wanted (120,)": shortened,
    "has dtype float64; wanted float32": widened,
    "it is damaged, cut off": cut_off,
    "its metadata has the format 'rmsprop_gpu'": whole_file,
    "is empty; wanted a checkpoint": lambda path: files(path)[0].write_bytes(b""),
    '"steps"] is None; wanted a count': put(None, "steps"),
    "wanted 'RMSProp'": put("AdaGrad", "optimizer"),
    '"param_groups"] is 7': put(7, "param_groups"),
}


@pytest.mark.parametrize("said", DAMAGED)
def test_a_folder_is_named_as_what_it_is(said, saved):
    DAMAGED[said](saved)
    opt = trained(1, 2)
    before = everything(opt)
    with pytest.raises((TypeError, ValueError)) as error:
        opt.load(saved)
    assert said.replace("it is damaged, cut off", "is damaged, cut off") in str(error.value)
    assert str(error.value).replace("\n", "").isprintable()
    assert everything(opt) == before


def test_an_index_that_is_too_long_is_not_read(saved, monkeypatch):
    monkeypatch.setattr(index, "LONGEST_HEAD", 100)
    with pytest.raises(ValueError, match=r"index.json' is longer than 100 bytes; wanted an index"):
        build().load(saved)


# Saves during a load


def test_a_save_while_files_are_opened_leads_to_the_new_ones(saved, monkeypatch):
    opening, seen = folder._open, []

    def opened(path):
        seen.append(path.name)
        if len(seen) == 3:  # after the index and one file
            cuts.save(saved, trained(1, 2), 3)
        return opening(path)

    monkeypatch.setattr(folder, "_open", opened)
    later = build()
    later.load(saved)
    assert later.steps == 2
    assert everything(later)[3] == everything(trained(1, 2))[3]
    assert [name for name in seen if name == index.NAME] == [index.NAME] * 2


def test_a_save_behind_the_opening_leads_to_the_new_ones(saved, monkeypatch):
    """Headers are read through names, and the old names are gone by then."""
    reading, seen = folder.read_head, []

    def read(path, file, wanted):
        seen.append(path.name)
        if len(seen) == 2:
            cuts.save(saved, trained(1, 2), 3)
        return reading(path, file, wanted)

    monkeypatch.setattr(folder, "read_head", read)
    later = build()
    later.load(saved)
    assert everything(later)[3] == everything(trained(1, 2))[3]
    assert len(seen) == 2 + 3


def test_a_file_that_another_one_replaces_is_read_anew(saved, monkeypatch):
    real, turns = os.path.samestat, iter([False])
    monkeypatch.setattr(os.path, "samestat", lambda a, b: next(turns, None) is None and real(a, b))
    assert build().load(saved) == ([], [])


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot delete an open file")
def test_what_is_open_is_read_to_its_end(saved):
    with checkpoint.opened(saved) as content:
        cuts.save(saved, trained(1, 2), 3)
        got = np.empty((4, 6, 5), np.float32)
        content["state"]["plain"]["square_avg"].read_into(got)
    assert_same_bits(got, trained(1).state["plain"]["square_avg"])


def test_a_part_that_becomes_shorter_while_it_is_read_says_so(saved, monkeypatch):
    opt, read = trained(1, 2), pieces.Host.read

    def shorten(self, source, piece):
        for file in files(saved):
            os.truncate(file, 2000)
        read(self, source, piece)

    monkeypatch.setattr(pieces.Host, "read", shorten)
    with pytest.raises(RuntimeError, match=r"loaded in part .*the file ends before its last array"):
        opt.load(saved)


# Mutations and kills


def leaves(content, at=()):
    """The paths to all values in a JSON document."""
    yield at
    if isinstance(content, (dict, list)):
        for key in content if isinstance(content, dict) else range(len(content)):
            yield from leaves(content[key], (*at, key))


ODD = st.sampled_from([None, True, -1, 0, 1, 2**63, 1e400, "", "plain/step", ALIKE, "float64", [], {}, [0], {"w": 1}])


@st.composite
def mutations(draw, good):
    """The index with one entry replaced, removed or duplicated, or with damaged bytes."""
    if draw(st.booleans()):
        text = bytearray(good)
        for at in draw(st.lists(st.integers(0, len(good) - 1), min_size=1, max_size=4)):
            text[at] = draw(st.sampled_from([*b'0123456789"{}[],:/x', 0, 255]))
        return bytes(text[: draw(st.one_of(st.just(len(text)), st.integers(0, len(text))))])
    content = json.loads(good)
    *way, key = draw(st.sampled_from(list(leaves(content))[1:]))
    within = content
    for one in way:
        within = within[one]
    match draw(st.sampled_from(["other", "away", "twice"])):
        case "other":
            within[key] = draw(ODD)
        case "away":
            del within[key]
        case "twice" if isinstance(within, list):
            within.append(within[key])
        case "twice":
            within[draw(st.sampled_from([*within, "w", ALIKE]))] = within[key]
    return json.dumps(content).encode()


def survive(path, examples):
    """Load mutated indices. Each is refused and changes nothing, or loads with all its arrays."""
    cuts.save(path, trained(1), 2)
    good, want = (path / index.NAME).read_bytes(), everything(trained(1))[3]
    known = {*path.iterdir()}
    counts = dict.fromkeys(["loaded", "refused"], 0)

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True)
    @given(mutations(good))
    def load(text):
        (path / index.NAME).write_bytes(text)
        opt = trained(1, 2)
        before = everything(opt)
        try:
            opt.load(path)
        except (TypeError, ValueError):
            counts["refused"] += 1
            assert everything(opt) == before
        else:
            counts["loaded"] += 1
            assert everything(opt)[3] == want
        assert {*path.iterdir()} == known

    load()
    return counts


def test_mutated_indices_are_refused_or_loaded(path):
    counts = survive(path, 200)
    assert counts["refused"] > counts["loaded"] > 0


@pytest.mark.exhaustive
def test_five_thousand_mutated_indices_are_refused_or_loaded(path):
    counts = survive(path, 5000)
    print(f"5,000 mutated indices: {counts['loaded']} loaded, {counts['refused']} refused")


def test_what_is_read_takes_no_memory_for_a_second_state(path):
    opt = RMSProp(np.ones(1_500_000, np.float64), momentum=0.9)
    opt.step(np.ones(1_500_000))
    cuts.save(path, opt, 3)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        opt.load(path)
        assert tracemalloc.get_traced_memory()[1] - before < 1.5 * opt.state.nbytes
    finally:
        tracemalloc.stop()


SAVING = """
import sys
sys.path.insert(0, HELPERS)
import cuts
import numpy as np
from rmsprop_gpu import RMSProp
opt = RMSProp({"w": np.ones(300_000, np.float32), "v": np.ones(7)}, momentum=0.9)
grads = {"w": np.ones(300_000, np.float32), "v": np.ones(7)}
opt.step(grads)
print("ready", flush=True)
while True:
    cuts.save(PATH, opt, 2)
    opt.step(grads)
"""


def kill(path, times, seed):
    """Kill a program that saves in a loop, at random moments. The folder must load each time, as one single save."""
    rng, steps = random.Random(seed), []
    code = SAVING.replace("HELPERS", repr(str(Path(cuts.__file__).parent))).replace("PATH", repr(str(path)))
    for _ in range(times):
        process = start(code)
        assert process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.01, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        process.stderr.close()
        opt = RMSProp({"w": np.ones(300_000, np.float32), "v": np.ones(7)}, momentum=0.9)
        if (path / index.NAME).exists():
            opt.load(path)
            steps.append(opt.steps)
            assert {int(opt.state[key]["step"]) for key in opt.state} == {opt.steps}
            of_each = {float(x) for key in opt.state for x in np.unique(opt.state[key]["momentum_buffer"])}
            assert len(of_each) <= 2  # one of each dtype
    assert steps
    cuts.save(path, opt, 2)
    assert {file.name for file in path.iterdir()} == {index.NAME, *read_index(path)["files"]}
    return steps


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_killed_save_leaves_a_folder_that_loads(path):
    kill(path, 3, 1)


@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_hundred_killed_saves_leave_folders_that_load(path):
    steps = kill(path, 100, 2)
    print(f"100 saves of folders killed: {len(steps)} indices, of {min(steps)} to {max(steps)} steps, all loaded")


# The command line


def test_inspect_shows_it_as_the_file_of_one_process(saved, capsys):
    trained(1).save(saved.with_name("one"))
    assert main(["inspect", str(saved)]) == 0
    got = capsys.readouterr().out.splitlines()
    assert main(["inspect", str(saved.with_name("one"))]) == 0
    want = capsys.readouterr().out.splitlines()
    assert sorted(line.replace(", in 2 files", "") for line in got) == sorted(want)
    assert got[2].startswith(want[2])
    assert got[2] != want[2]


def test_inspect_refuses_a_folder_that_is_no_checkpoint(saved, capsys):
    (saved / index.NAME).unlink()
    assert main(["inspect", str(saved)]) == 1
    assert "has no index.json" in capsys.readouterr().err
