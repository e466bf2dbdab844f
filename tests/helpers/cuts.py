"""The state of one optimizer, cut into parts as if several processes held it, and saved by each of them in turn."""

import contextlib

from rmsprop_gpu.kernels.codes import BLOCK
from rmsprop_gpu.state import folder
from rmsprop_gpu.state.kinds import BASES, is_counter


def cut(opt, ranks):
    """The parts of each process: equal ranges of all elements in a row. Counters go with the start of their tensor."""
    total = sum(p.size for p in params(opt).values())
    parts, begin = [[] for _ in range(ranks)], 0
    for key, p in params(opt).items():
        end = begin + p.size
        unit = BLOCK if set(BASES) & set(opt.state[key]) else 1  # blocks of codes stay whole
        for rank in range(ranks):
            low, high = (total * r // ranks for r in (rank, rank + 1))
            start, stop = (_border(x - begin, p.size, unit) for x in (low, high))
            first = rank == 0 if not p.size else start == 0 < stop
            for kind, x in opt.state[key].items():
                if is_counter(kind):
                    parts[rank] += [part(key, kind, None, None, x)] * first
                elif start < stop or (first and not p.size):
                    a, b = (start // BLOCK, -(-stop // BLOCK)) if kind in BASES else (start, stop)
                    parts[rank].append(part(key, kind, a, b, x.ravel()[a:b]))
        begin = end
    return parts


def _border(at, size, unit):
    """Where to cut a tensor."""
    return size if at >= size else max(0, at) // unit * unit


def params(opt):
    return dict(zip(opt.state, (p for group in opt.param_groups for p in group["params"]), strict=True))


def part(key, kind, start, stop, array):
    return folder.Part(key, kind, start, stop, array, contextlib.nullcontext)


def frame(opt):
    return {name: x for name, x in opt.state_dict().items() if name != "state"}


def tensors(opt):
    return {key: (p.dtype, p.shape) for key, p in params(opt).items()}


def write_files(path, opt, ranks):
    """Write the files of all processes. Returns their parts by file name."""
    token = folder.new_token()
    return {
        (name := folder.file_name(opt.steps, token, rank)): folder.write_file(path, name, parts)
        for rank, parts in enumerate(cut(opt, ranks))
    }


def save(path, opt, ranks):
    """Save a checkpoint of `ranks` processes."""
    folder.write_index(path, frame(opt), tensors(opt), write_files(path, opt, ranks))
