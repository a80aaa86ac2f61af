"""Memory of the machine for PTX (ptx.py): tensors, and shared memory that knows races, copies and bank conflicts."""

import ctypes

import numpy as np

LOADED = 320  # what integers in memory that is not there are taken for: a position some blocks into a cache
SEVERAL = np.int32(-2)  # warps that read a byte
ROUNDING = 1e-5  # of sums in float32, absolute and relative


class Fault(AssertionError):
    """What a kernel must not do."""


class Tensors:
    """The memory that a kernel was given: the storages of its tensors."""

    def __init__(self, tensors):
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
        self.parts = {at: np.frombuffer((ctypes.c_uint8 * x.nbytes()).from_address(at), "u1")
                      for at, x in storages.items() if x.nbytes()}

    def find(self, address, width):
        """(storage, which of the addresses are in it, places [n, width]) of each that is needed."""
        if (address % np.uint64(width)).any():
            raise Fault(f"an access of {width} bytes that is not aligned")
        left = np.ones(len(address), bool)
        for at, content in self.parts.items():
            mine = (address >= at) & (address + np.uint64(width) <= at + len(content))
            if mine.any():
                left &= ~mine
                yield content, mine, (address[mine] - np.uint64(at)).astype("i8")[:, None] + np.arange(width)
        if left.any():
            raise Fault(f"an access outside of all tensors by {left.sum()} threads")

    def read(self, address, width):
        out = np.empty((len(address), width), "u1")
        for content, mine, places in self.find(address, width):
            out[mine] = content[places]
        return out

    def write(self, address, data):
        for content, mine, places in self.find(address, data.shape[1]):
            content[places] = data[mine]


class Anything:
    """Memory that is not there: zeros, but LOADED where 4 or 8 bytes are read; what is written is forgotten."""

    def read(self, address, width):
        value = np.array([LOADED], f"u{width}") if width in (4, 8) else np.zeros(1, f"V{width}")
        return np.broadcast_to(value.view("u1"), (len(address), width))

    def write(self, address, data):
        pass


class Shared:
    """Shared memory of some programs, `size` bytes each, and what is known of every byte."""

    def __init__(self, size, programs, threads, counting):
        self.size, self.counting, self.cycles, self.least = size, counting, 0, 0
        self.bytes = np.full(size * programs, 0xFF, "u1")
        self.epoch = 0  # barriers so far; programs that are not at one have run until their next
        self.written, self.writer, self.seen, self.reader = np.full((4, size * programs), -1, "i4")  # when, and by whom
        self.coming, self.busy = np.zeros((2, size * programs), bool)  # copies are on their way; tensor cores read
        self.group, self.copies = np.zeros(threads, "i4"), []  # groups of copies that a thread has made

    def places(self, address, width, program):
        """Places [n, width] in `bytes` of an access by threads of these programs."""
        address = address.astype("i8")
        if (address % width).any() or (address + width > self.size).any():
            raise Fault(f"an access of {width} bytes, not aligned or beyond {self.size} bytes of shared memory")
        return (address + program * self.size)[:, None] + np.arange(width)

    def look(self, places, warp):
        """Note that warps read; SEVERAL do where they are not known apart."""
        if self.counting:
            return
        if self.coming[places].any():
            raise Fault("shared memory is read before a copy has landed")
        if (self.written[places] < 0).any():
            raise Fault("shared memory is read where nothing was stored")
        if ((self.written[places] == self.epoch) & (self.writer[places] != warp)).any():
            raise Fault("a race: shared memory is read after another warp's store, without a barrier")
        other = (self.seen[places] == self.epoch) & (self.reader[places] != warp)
        self.seen[places], self.reader[places] = self.epoch, np.where(other, SEVERAL, warp)
        self.reader[places[self.reader[places] != warp]] = SEVERAL  # at the same time

    def guard(self, places, data, warp):
        """Fault where a store, or a copy, would meet others."""
        if self.counting:
            return
        if self.coming[places].any() or self.busy[places].any():
            raise Fault("shared memory is written where a copy has not landed, or tensor cores read")
        if ((self.seen[places] == self.epoch) & (self.reader[places] != warp)).any():
            raise Fault("a race: shared memory is written after another warp's load, without a barrier")
        other = (self.written[places] == self.epoch) & (self.writer[places] != warp)
        if (other & (self.bytes[places] != data)).any():
            raise Fault("a race: two warps store to the same place of shared memory")

    def store(self, places, data, warp):
        self.guard(places, data, warp)
        self.bytes[places], self.written[places], self.writer[places] = data, self.epoch, warp
        if data.shape[1] % 4 == 0 and not self.counting:
            # Threads that hold the same sum may have rounded it differently: which of them is stored is not told
            stored, given = (np.ascontiguousarray(x).view("f4") for x in (self.bytes[places], data))
            alike = np.isclose(stored, given, ROUNDING, ROUNDING) & (np.abs(given) > np.finfo("f4").tiny)
            if (~alike & (stored.view("u4") != given.view("u4"))).any():
                raise Fault("a race: two threads store to the same place of shared memory")

    def copy(self, places, data, warp, thread):
        self.guard(places, data, warp)
        self.coming[places] = True
        self.copies.append((places, data, warp, thread, self.group[thread]))

    def land(self, left, threads):
        """Threads wait for all groups of their copies but the last `left`."""
        waiting, flying = np.zeros(len(self.group), bool), []
        waiting[threads] = True
        for places, data, warp, thread, group in self.copies:
            done = waiting[thread] & (group < self.group[thread] - left)
            self.coming[places[done]], self.bytes[places[done]] = False, data[done]
            self.written[places[done]], self.writer[places[done]] = self.epoch, warp[done]
            if not done.all():
                flying.append(tuple(x[~done] for x in (places, data, warp, thread, group)))
        self.copies = flying

    def count(self, address, width, lanes, matrices):
        """Bank conflicts. There are 32 banks of 4 bytes. A warp is served in phases of at most 128 bytes, which take as
        many cycles as one bank has words to give (ldmatrix and stmatrix: a phase for each matrix)."""
        if not self.counting:
            return
        full, active = np.zeros(len(self.group), "i8"), np.zeros(len(self.group), bool)
        full[lanes], active[lanes] = address, True
        phase = 8 if matrices else min(128 // width, 32)
        full, active = (x.reshape(-1, 32)[:, : 8 * matrices or 32].reshape(-1, phase) for x in (full, active))
        words = np.where(active[..., None], full[..., None] // 4 + np.arange(max(width // 4, 1)), -1)
        words = np.sort(words.reshape(len(words), -1), 1)
        row, column = np.nonzero(np.diff(words, axis=1, prepend=-1))
        banks = np.zeros((len(words), 32), "i8")
        np.add.at(banks, (row, words[row, column] % 32), 1)
        self.cycles, self.least = self.cycles + int(banks.max(1).sum()), self.least + int(active.any(1).sum())
