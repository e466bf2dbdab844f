"""What the parts of python -m benchmarks.gpu report. Their findings are made up, and nothing runs on a GPU."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from paths import ROOT

# An installed package does not include benchmarks/. It comes last, so that the installed package is the one tested.
sys.path.append(str(ROOT))

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import bits, chunks, programs, speed, tools, torch, uploads, versions
from benchmarks.gpu.measuring import Record
from benchmarks.gpu.part import Run


def headline_and_lines(one, result):
    return one.headline(result), "\n".join(one.lines(result))


def same(differ=0):
    rows = [{"dtype": d, "case": c, "differ": 0, "of": 1000} for d in bits.DTYPES for c in bits.CASES]
    rows[3]["differ"] = differ
    return {"rows": rows}


def test_bits_that_differ_are_bold():
    headline, table = headline_and_lines(bits.PART, same())
    assert headline.startswith("24 of 24 cases hold the same bits")
    assert "**" not in headline + table
    headline, table = headline_and_lines(bits.PART, same(differ=2))
    assert headline.startswith("23 of 24 cases")
    assert "**not the same: float32 decoupled, averaged**" in headline
    assert "**2 of 1,000**" in table


def test_a_difference_is_a_failure(tmp_path, monkeypatch):
    for differ in (0, 1):
        monkeypatch.setattr(bits, "compare", lambda *given, differ=differ: {"differ": differ, "of": 9})
        record = Record(tmp_path / "bits.json")
        bits.measure(record, rehearse=True)
        assert (record.failed, len(record.found["rows"])) == (differ > 0, 24)


def test_bits_that_were_not_reached_are_told():
    headline, table = headline_and_lines(bits.PART, {"rows": same()["rows"][:7]})
    assert headline.startswith("7 of 7 cases, of 24,")
    assert table.count("not run") == 17


@pytest.mark.parametrize("dtype", bits.DTYPES)
def test_one_bit_is_a_difference(dtype):
    pytest.importorskip("ml_dtypes")
    x = np.array([1, 0, np.nan, np.inf], bits.dtype_of(dtype))
    negative_nan = np.array([1, 0, -np.float64("nan"), np.inf], x.dtype)
    assert bits.differing(negative_nan, x) == 0
    for k in range(4):
        other = x.copy()
        other.view(f"u{x.itemsize}")[k] ^= 1 if k == 0 else 1 << (8 * x.itemsize - 1 - (k == 2))
        assert bits.differing(other, x) == 1
    assert bits.differing(np.float32(1), np.float32(2)) == 1


@pytest.mark.parametrize("dtype", bits.DTYPES)
def test_bits_are_compared_on_special_numbers(dtype):
    pytest.importorskip("ml_dtypes")
    for finite in (False, True):
        x = bits.Draw(bits.dtype_of(dtype), finite)(4000, 4).astype(np.float64)
        assert np.isfinite(x).all() == finite
        assert np.isnan(x).any() != finite
        assert (np.signbit(x) & (x == 0)).any()


def uploaded(**changes):
    keys = {"seconds": 1e-5, "waited": False, "as_at_the_call": True}
    rows = [{"way": way, "bytes": 8, **keys} for way in (uploads.FIRST, uploads.OURS, uploads.PAGEABLE)]
    for way, change in changes.items():
        rows[("first", "ours", "pageable").index(way)].update(change)
    return {"rows": rows}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "all data is that of its call; the host never waited"),
        ({"pageable": {"waited": True, "as_at_the_call": False}}, "the host never waited"),
        ({"first": {"waited": True}}, "the host never waited"),
        ({"ours": {"waited": None}}, "the host had nothing to wait for"),
        ({"ours": {"waited": True}}, "**not as promised: the package's copy (8 bytes)**"),
        ({"ours": {"as_at_the_call": False}}, "**not as promised"),
        ({"first": {"as_at_the_call": False}}, "**not as promised"),
        ({"ours": {"failed": "no memory"}}, "**not as promised"),
    ],
)
def test_of_uploads_the_package_s_own_have_to_be_as_promised(changes, said):
    result = uploaded(**changes)
    if "failed" in changes.get("ours", {}):
        result["rows"][1] = {"way": uploads.OURS, "bytes": 8, "failed": "no memory"}
    assert said in uploads.PART.headline(result)
    assert len(uploads.PART.lines(result)) == 7


def quartiles(median):
    return {"median": median, "q1": 0.9 * median, "q3": 1.1 * median}


def step(elements, seconds, copy, what=speed.PLAIN):
    times = {"seconds": quartiles(seconds), "copy_seconds": quartiles(copy)}
    return {"what": what, "elements": elements, "bytes": 20 * elements, **times}


def test_speed_is_told_beside_a_copy():
    rows = [step(1_000_000, 20e-6, 10e-6), step(100_000_000, 1e-3, 0.9e-3), step(10, 1, 1, "another")]
    rows.append({"what": speed.PLAIN, "failed": "OutOfMemoryError"})
    headline, table = headline_and_lines(speed.PART, {"rows": rows})
    assert headline == (
        "plain float32, 100,000,000 elements: 2000 GB/s, 90 % of a copy; of all sizes at least 50 %, with 1,000,000"
    )
    assert "| plain float32 | 100,000,000 | 2000 MB | 1 ms | 900 us to 1.1 ms | 2000 | 2222 | 90 % |" in table
    assert "**failed**: OutOfMemoryError" in table


def in_torch(who, how, host, device, what="one"):
    return {"what": what, "who": who, "how": how, "host_seconds": quartiles(host), "device_seconds": quartiles(device)}


def test_the_class_for_torch_is_told_beside_torchs():
    rows = [in_torch(torch.OURS, torch.EAGER, 2e-5, 1e-5), in_torch(torch.FOREACH, torch.EAGER, 6e-5, 4e-5)]
    rows += [{"what": "one", "who": torch.LOOP, "how": torch.EAGER, "failed": "OutOfMemoryError"}]
    rows += [in_torch(torch.OURS, torch.REPLAYED, 4e-6, 8e-6), in_torch(torch.FOREACH, torch.REPLAYED, 4e-6, 4e-5)]
    rows += [{"what": "two", "who": torch.OURS, "how": torch.EAGER, "failed": "no"}]
    rows += [in_torch(torch.FOREACH, torch.EAGER, 1, 1, "two")]
    headline, table = headline_and_lines(torch.PART, {"rows": rows})
    assert headline == ("one: host 20 us, device 10 us (torch foreach 3 and 4 times as long); two: **failed**")
    assert "| one | rmsprop_gpu.torch | eager | 20 us | 10 us | 1 | 1 |" in table
    assert "| one | torch for-loop | eager | **failed**: OutOfMemoryError |  |  |  |" in table
    assert "| one | torch foreach | graph | 4 us | 40 us | 1 | 5 |" in table
    assert "| two | torch foreach | eager | 1 s | 1 s |  |  |" in table


def test_without_torch_or_a_card_for_it_the_part_is_left_out(monkeypatch):
    def said(text):
        monkeypatch.setattr(torch.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, stdout=text))
        return torch.PART.missing()

    monkeypatch.setattr(torch, "find_spec", lambda name: None)
    assert torch.PART.missing() == "torch is not installed"
    monkeypatch.setattr(torch, "find_spec", lambda name: name)
    assert said("True\n") is None
    assert said("False\n") == said("") == "torch finds no CUDA device"


def test_the_best_chunk_of_each_size_is_bold():
    def row(threads, chunk, elements, seconds):
        return {"threads": threads, "chunk": chunk, "elements": elements, "seconds": quartiles(seconds)}

    rows = [row(256, chunks.CHOSEN, 1000, 2e-6), row(256, chunks.CHOSEN, 9000, 4e-6)]
    rows += [row(256, 1024, 1000, 1e-6), row(256, 1024, 9000, 8e-6), {**row(512, 99, 9000, 1), "failed": "too many"}]
    del rows[-1]["seconds"]
    headline, table = headline_and_lines(chunks.PART, {"rows": rows})
    assert "1,000 elements: best 20 GB/s with 256 threads, chunk 1024, the package's choice 50 % of it" in headline
    assert (
        "9,000 elements: best 45 GB/s with 256 threads, chunk as chosen, the package's choice 100 % of it" in headline
    )
    assert "| 256 | as chosen | 10 | **45** |" in table
    assert "| 256 | 1024 | **20** | 22.5 |" in table
    assert "* 512 threads, 99: too many" in table


TEST = """
import pytest
def test_passes(): pass
def test_fails(): assert 1 == 2
@pytest.mark.skip
def test_is_skipped(): pass
@pytest.fixture
def broken(): raise OSError("no device")
def test_has_no_device(broken): pass
"""


def test_tests_that_fail_are_named(tmp_path):
    (tmp_path / "test_some.py").write_text(TEST)
    given = Run(tmp_path, tmp_path, rehearse=False)
    assert programs.tests_found(given) is None
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={tmp_path / programs.XML}"]
    subprocess.run([*words, "--rootdir", str(tmp_path), str(tmp_path)], cwd=tmp_path, capture_output=True, check=False)
    headline, table = headline_and_lines(programs.TESTS, programs.tests_found(given))
    assert headline == "1 passed, 1 skipped, **2 failed**"
    assert re.search(r"^\* `\S*test_some.test_fails`: assert 1 == 2$", table, re.MULTILINE)
    assert re.search(r"^\* `\S*test_some.test_has_no_device`: .*no device", table, re.MULTILINE)


NCU = """
==PROF== Connected to process 7
  update_kernel (32768, 1, 1)x(256, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    Section: GPU Speed Of Light Throughput
    ----------------------- ----------- ------------
    Metric Name             Metric Unit Metric Value
    ----------------------- ----------- ------------
    Memory Throughput                 %        91.20
    DRAM Throughput                   %        91.20
    Duration                         us       433.15
    Registers Per Thread             register/thread              38
    Memory Throughput        Tbyte/s         3.01
    Issued Warp Per Scheduler                        0.21
"""


def test_nsight_s_numbers_are_read_from_what_it_says(tmp_path):
    given = Run(tmp_path, tmp_path, rehearse=False)
    assert tools.nsight_found(given) is None
    log = given.log(tools.NSIGHT)
    log.parent.mkdir()
    log.write_text("$ ncu\n==ERROR== ERR_NVGPUCTRPERM\n")
    assert tools.nsight_found(given) is None
    log.write_text(NCU)
    assert tools.nsight_found(given) == {
        "Memory Throughput (%)": "91.20",
        "DRAM Throughput (%)": "91.20",
        "Duration (us)": "433.15",
        "Registers Per Thread (register/thread)": "38",
        "Memory Throughput (Tbyte/s)": "3.01",
        "Issued Warp Per Scheduler": "0.21",
    }


@pytest.mark.parametrize(
    ("said", "headline"),
    [
        ("ERROR SUMMARY: 0 errors", "0 errors"),
        ("ERROR SUMMARY: 12 errors", "**12 errors**"),
        ("Segmentation fault", None),
    ],
)
def test_what_a_sanitizer_has_found_is_read_from_what_it_says(tmp_path, said, headline):
    given = Run(tmp_path, tmp_path, rehearse=False)
    given.log(tools.MEMCHECK).parent.mkdir()
    given.log(tools.MEMCHECK).write_text(f"========= COMPUTE-SANITIZER\n========= {said}\n")
    result = tools.MEMCHECK.result(given)
    assert (result and tools.MEMCHECK.headline(result)) == headline


def test_tools_are_found_where_the_toolkit_is(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert tools.MEMCHECK.missing() == "compute-sanitizer is not installed"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "compute-sanitizer").touch(0o755)
    assert tools.MEMCHECK.missing() is None
    given = Run(tmp_path, tmp_path, rehearse=True)
    assert tools.MEMCHECK.command(given)[0] == str(tmp_path / "bin" / "compute-sanitizer")


def test_workloads_are_told_beside_the_fastest_rival():
    def row(ratio):
        return {"seconds": quartiles(1e-3), "fraction_of_copy": 0.9, "ratio_to": {programs.OURS: quartiles(ratio)}}

    results = {programs.OURS: {**row(1), "ratio_to": {}}, "torch foreach": row(3.2), "cupy elementwise": row(1.6)}
    results |= {programs.AGAIN: row(1.01), programs.COPY: row(0.9), "cupy fuse": {"left_out": "it does not compile"}}
    result = {"workloads": {"one-25m": {"results": results}}}
    headline, table = headline_and_lines(programs.BENCHMARKS, result)
    assert headline == (
        "`one-25m` 1 ms (90 % of a copy, cupy elementwise takes 1.6 times as long); left out: cupy fuse"
    )
    assert "| `one-25m` | 1 ms | 1.01 | 1.6 | left out | 3.2 |  | 0.9 |" in table
    assert "* cupy fuse: it does not compile" in table


def test_a_bound_of_the_host_that_is_missed_is_bold():
    row = {
        "tensors": "one tensor",
        "gradients": "unchanged",
        "bound": 15,
        "us": {"step": [19, 20, 21], "launch": [4, 5, 6]},
    }
    headline, table = headline_and_lines(programs.HOST, {"rows": [row]})
    assert headline == "one tensor, gradients unchanged: 20 us (**wanted: 15**)"
    assert "| one tensor | unchanged | 15 | 20 | 5 |" in table
    assert "**" not in programs.HOST.headline({"rows": [{**row, "bound": 20}]})


def test_versions_that_are_not_known_say_why():
    result = {"nvidia_smi": None, "properties": {"name": "A Card", "compute_capability": "9.0", "bus_bits": None},
              "links_with_lto": True, "unknown": {"nvidia_smi": "nvidia-smi is not installed"}}  # fmt: skip
    headline, table = headline_and_lines(versions.PART, result)
    assert headline == "A Card, compute capability 9.0, driver not known"
    assert table == (
        "* properties: name A Card, compute_capability 9.0\n* links with lto: True\n"
        "* nvidia smi: not known: nvidia-smi is not installed"
    )
    assert (
        versions.PART.headline({"properties": None, "unknown": {"properties": "no driver"}}) == "no device: no driver"
    )


# The inside of a part


def test_a_row_that_fails_leaves_the_others(tmp_path, capsys):
    record = Record(tmp_path / "x.json")
    record.row({"size": 1}, lambda: {"n": 1})
    assert not record.failed
    record.row({"size": 2}, lambda: {"n": 1 / 0})
    record.row({"size": 3}, lambda x, y: {"n": x + y}, 1, y=2)
    record.fact("name", lambda: "a card")
    record.fact("clock", lambda: {}["clock"])
    assert record.failed
    assert json.loads((tmp_path / "x.json").read_text()) == {
        "rows": [
            {"size": 1, "n": 1},
            {"size": 2, "failed": "ZeroDivisionError: division by zero"},
            {"size": 3, "n": 3},
        ],
        "name": "a card",
        "unknown": {"clock": "KeyError: 'clock'"},
        "clock": None,
    }
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("one", command.PARTS, ids=lambda one: one.name)
def test_every_part_has_a_command_and_takes_a_result_cut_short(one, tmp_path):
    for rehearse in (False, True):
        words = one.command(Run(tmp_path, tmp_path, rehearse))
        assert all(isinstance(word, str) for word in words)
    assert one.result(Run(tmp_path, tmp_path, True)) is None
    if one.name in ("bits", "uploads", "speed", "torch", "chunks"):
        failed = {"rows": [{"failed": "no", "dtype": "float32", "case": "plain", "way": "a", "what": "a", "threads": 1,
                            "chunk": 1, "elements": 1, "who": "a", "how": "a"}]}  # fmt: skip
        for result in ({"rows": []}, failed):
            assert all(isinstance(text, str) for text in (one.headline(result), *one.lines(result)))
