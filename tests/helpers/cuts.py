"""The state of one optimizer as several processes would have it, each a part; and saved by them, in turn."""

import contextlib

from rmsprop_gpu.state import folder
from rmsprop_gpu.state.kinds import is_counter


def cut(opt, ranks):
    """Of each process its parts: ranges of one length of all elements in a row; counters where a tensor begins."""
    total = sum(p.size for p in params(opt).values())
    parts, begin = [[] for _ in range(ranks)], 0
    for key, p in params(opt).items():
        end = begin + p.size
        for rank in range(ranks):
            low, high = (total * r // ranks for r in (rank, rank + 1))
            start, stop = max(low, begin) - begin, min(high, end) - begin
            first = rank == 0 if not p.size else low <= begin < high
            for kind, x in opt.state[key].items():
                if is_counter(kind):
                    parts[rank] += [part(key, kind, None, None, x)] * first
                elif start < stop or (first and not p.size):
                    parts[rank].append(part(key, kind, start, max(start, stop), x.ravel()[start:stop]))
        begin = end
    return parts


def params(opt):
    return dict(zip(opt.state, (p for group in opt.param_groups for p in group["params"]), strict=True))


def part(key, kind, start, stop, array):
    return folder.Part(key, kind, start, stop, array, contextlib.nullcontext)


def frame(opt):
    return {name: x for name, x in opt.state_dict().items() if name != "state"}


def tensors(opt):
    return {key: (p.dtype, p.shape) for key, p in params(opt).items()}


def write_files(path, opt, ranks):
    """The files of all processes; by name their parts."""
    token = folder.new_token()
    return {
        (name := folder.file_name(opt.steps, token, rank)): folder.write_file(path, name, parts)
        for rank, parts in enumerate(cut(opt, ranks))
    }


def save(path, opt, ranks):
    """A checkpoint of so many processes."""
    folder.write_index(path, frame(opt), tensors(opt), write_files(path, opt, ranks))
