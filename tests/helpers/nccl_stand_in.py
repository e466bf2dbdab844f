"""A stand-in for NCCL: its two collectives on a stream, done by MPI with copies in host memory."""

import threading

import cupy
import numpy as np

from rmsprop_gpu.distributed.mpi import MPIEngine


class StandIn:
    """The methods and attributes of ``nccl.core.Communicator`` that a sharded optimizer uses.

    It waits only for the stream it is given, and enqueues its result there. Work that is not ordered with that stream
    therefore sees old values. It sums in rank order, halves in float32, and rounds once.
    """

    def __init__(self, comm):
        self._engine = MPIEngine(comm.Dup())
        self.rank, self.nranks = comm.rank, comm.size
        self.failed = 0  # what `get_async_error` returns
        self.calls = []
        self._pinned = {}

    def get_async_error(self):
        return self.failed

    def reduce_scatter(self, sendbuf, recvbuf, op, *, stream):
        assert op == 0  # ncclSum
        assert (sendbuf.dtype, sendbuf.size) == (recvbuf.dtype, recvbuf.size * self.nranks)
        lines = (self.nranks, recvbuf.size)
        whole = self._fetched(sendbuf, stream).reshape(lines)
        own = self._host("own", recvbuf, stream)
        self._engine.reduce(whole, np.empty_like(whole), own)
        self._enqueue(recvbuf, own, stream)
        self.calls.append("reduce_scatter")

    def allgather(self, sendbuf, recvbuf, *, stream):
        assert (sendbuf.dtype, sendbuf.size * self.nranks) == (recvbuf.dtype, recvbuf.size)
        whole = self._host("whole", recvbuf, stream).reshape(self.nranks, sendbuf.size)
        whole[self.rank] = self._fetched(sendbuf, stream)
        self._engine.gather(whole)
        self._enqueue(recvbuf, whole.reshape(-1), stream)
        self.calls.append("allgather")

    def _host(self, what, array, stream):
        """Pinned memory of the array's size, per stream. Waiting for the stream again means its last copy is done."""
        key = what, array.nbytes, stream
        if key not in self._pinned:
            self._pinned[key] = cupy.cuda.alloc_pinned_memory(max(array.nbytes, 1))
        return np.frombuffer(self._pinned[key], np.uint8, array.nbytes).view(array.dtype)

    def _fetched(self, array, stream):
        assert array.flags.c_contiguous
        assert array.data.device_id == cupy.cuda.runtime.getDevice()
        assert stream
        host = self._host("sent", array, stream)
        runtime = cupy.cuda.runtime
        runtime.memcpyAsync(host.ctypes.data, array.data.ptr, array.nbytes, runtime.memcpyDeviceToHost, stream)
        runtime.streamSynchronize(stream)
        return host

    def _enqueue(self, array, host, stream):
        runtime = cupy.cuda.runtime
        runtime.memcpyAsync(array.data.ptr, host.ctypes.data, array.nbytes, runtime.memcpyHostToDevice, stream)


def is_held(stream, work):
    """Whether this only enqueues work on a stream that is blocked.

    The first try lasts a second: it allocates what a step on a busy stream needs, and CUDA may wait when it allocates.
    """
    for seconds in 1, 20:
        go = threading.Event()
        stream.launch_host_func(lambda _, go=go, seconds=seconds: go.wait(seconds), None)
        work()
        held = not stream.done
        go.set()
        stream.synchronize()
    return held
