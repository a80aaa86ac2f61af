"""Runs kernels as Triton compiles them for NVIDIA GPUs: their PTX, an instruction at a time, on a CPU.

Triton's interpreter runs a kernel's Python. It knows nothing of layouts, of copies that are still on their way, or of
barriers between warps. Here all of these are run, for every thread of several programs at once. A `Fault` is what may
or may not show on a GPU: an access outside of the storages of the kernel's tensors, or off its alignment; shared memory
that is read before anything was stored there, or before a copy has landed, or where another warp, or tensor cores, may
be reading or writing. Not seen: races within a warp and in global memory, missing proxy fences, registers of wgmma that
are read too early. Not run: what ptxas makes of the PTX, and tensor memory (sm_100). Tensor cores and fused products
round once, from float64, better than a GPU's; ex2, rsqrt and division are off by a unit at most.

    NANOLLAMAGEN_PTX=sm_90 python -m pytest tests/test_linear.py   # the tests of kernels, on what is compiled for sm_90

Source: NVIDIA, PTX ISA 8.7, sections 5 (memory), 9.7 (instructions) and 9.7.14, 9.7.15 (operands of mma and wgmma).
"""

import functools
import itertools
import re

import numpy as np
from ptx_memory import SEVERAL, Anything, Fault, Shared, Tensors

TARGETS = {
    "sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32), "gfx942": ("hip", "gfx942", 64),
}
TOGETHER = 4096  # threads that are run at once
KINDS = {f"{kind}{8 * size}": f"{'i' if kind == 's' else 'u'}{size}" for kind in "bus" for size in (1, 2, 4, 8)}
KINDS |= {"pred": "?", "f16": "f2", "f32": "f4", "f64": "f8", "bf16": "u2"}
KINDS |= {"f16x2": "u4", "bf16x2": "u4", "f32x2": "u8"}  # pairs


class FakeDriver:
    """Answers what a launch asks of the driver, so that Triton specialises and compiles as on the real GPU."""

    def __init__(self, target):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget(*TARGETS[target])

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return [arch for _, arch, _ in TARGETS.values()].index(self.target.arch)

    def get_current_stream(self, device=None):
        return 0


# Numbers


def size_of(kind):
    return np.dtype(KINDS[kind]).itemsize


def decode(bits, kind):
    """Bits of registers as numbers; of packed pairs [N, 2], of bfloat16 as float32."""
    if kind.endswith("x2"):
        return decode(np.ascontiguousarray(bits).view(f"u{bits.itemsize // 2}").reshape(-1, 2), kind[:-2])
    return (bits.astype("u4") << 16).view("f4") if kind == "bf16" else bits.view(KINDS[kind])


def encode(x, kind):
    """Numbers to bits of their type, rounded to the nearest, the even one of two; integers wrap."""
    if kind.endswith("x2"):
        return np.ascontiguousarray(encode(x, kind[:-2])).view(KINDS[kind]).reshape(-1)
    if kind == "bf16":
        bits = np.ascontiguousarray(x, "f4").view("u4")
        return np.where(np.isnan(x), 0x7FFF, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("u2")
    x = np.asarray(x).astype(KINDS[kind])
    return x if kind == "pred" else x.view(f"u{x.itemsize}")


def constant(word, kind):
    """A number as it stands in a statement."""
    if word[:2] in ("0f", "0d"):
        bits = np.array([int(word[2:], 16)], "u4" if word[1] == "f" else "u8")
        return decode(bits, kind if bits.itemsize == size_of(kind) else "f32")
    value = int(word.rstrip("U"), 0)
    size = size_of(kind)
    return np.array([value != 0]) if kind == "pred" else decode(np.array([value % 256**size], f"u{size}"), kind)


def flush(x):
    """Subnormal numbers as 0 (.ftz)."""
    return np.where(np.abs(x) < np.finfo("f4").tiny, np.copysign(np.float32(0), x), x)


def blur(x):
    """Off by a unit in the last place or not, the same for equal fractions, as approximations of GPUs are."""
    bits = np.ascontiguousarray(x).view("u4")
    fraction = bits & 0x7FFFFF
    kept = ~np.isfinite(x) | (np.abs(x) < 1e-30) | (fraction == 0)  # 0, powers of two and infinity are exact
    return np.where(kept, bits, bits + (fraction * np.uint32(0x9E3779B1) >> 28) % 3 - 1).astype("u4").view("f4")


def divide(a, b):
    return a / b if a.dtype.kind == "f" else (a - np.fmod(a, b)) // b


def multiply(a, b, c=None, high=False, wide=False):
    """The lower half of the product, the upper one, or all of it; plus c."""
    product = a * b
    if high or wide:
        double = f"{a.dtype.kind}{2 * a.itemsize}"
        product = a.astype(double) * b.astype(double)
        product = (product >> 8 * a.itemsize).astype(a.dtype) if high else product
    return product if c is None else product + c


def fuse(a, b, c):
    """a b + c, rounded once, or nearly so."""
    exact = "g" if a.itemsize == 8 else "f8"
    return (a.astype(exact) * b + c).astype(a.dtype)


def extract(a, start, length):
    """Bits of a; the highest of them is the sign of a signed number."""
    start, length = (start & 255).astype(a.dtype), (length & 255).astype(a.dtype)
    bits = a >> start & (1 << length) - 1
    return bits - ((bits >> length - 1 & 1) << length) if a.dtype.kind == "i" else bits


def insert(a, b, start, length):
    """b, but from bit `start` on, for `length` bits, the lowest of a."""
    start, length = (start & 255).astype(a.dtype), (length & 255).astype(a.dtype)
    where = (1 << length) - 1 << start
    return b & ~where | a << start & where


def permute(a, b, selectors):
    """Four of the eight bytes of a and b; selectors above 7 ask for copies of a byte's sign."""
    a, b, selectors = np.broadcast_arrays(a, b, selectors)
    pool = np.stack([a, b], 1).view("u1").reshape(-1, 8)
    which = np.stack([selectors >> 4 * i & 15 for i in range(4)], 1)
    picked = np.take_along_axis(pool, (which & 7).astype("i8"), 1)
    return np.where(which & 8, np.where(picked & 128, 255, 0), picked).astype("u1").view("u4").reshape(-1)


def fold(function):
    """Of two operands or three."""
    return lambda *x: functools.reduce(function, x)


OPERATIONS = {
    "add": np.add, "sub": np.subtract, "div": divide, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "not": np.invert, "neg": np.negative, "abs": np.abs, "sqrt": np.sqrt, "popc": np.bitwise_count,
    "ex2": lambda x: np.exp2(x.astype("f8")).astype("f4"),
    "rsqrt": lambda x: (1 / np.sqrt(x.astype("f8"))).astype("f4"), "fma": fuse, "bfe": extract, "bfi": insert,
    "prmt": permute, "shl": lambda a, b: a << np.minimum(b, 64).astype(a.dtype),
    "shr": lambda a, b: a >> np.minimum(b, 64).astype(a.dtype),  # by all bits and more: nothing but the sign is left
    "mul": multiply, "mad": multiply, "min": fold(np.fmin), "max": fold(np.fmax),
}
MODIFIERS = {  # that a statement may have besides its types: with another it would do something else
    "add": "rn ftz", "sub": "rn ftz", "mul": "rn ftz lo hi wide", "mad": "lo wide", "fma": "rn ftz",
    "div": "full approx", "ex2": "approx ftz", "rsqrt": "approx ftz", "sqrt": "approx ftz", "cvt": "rn rzi rpi",
    "setp": "eq ne lt le gt ge equ neu ltu leu gtu geu num", "ld": "param global shared shared::cta v2 v4",
    "st": "global shared shared::cta v2 v4", "cp": "async ca cg shared shared::cta global commit_group wait_group",
    "shfl": "sync up bfly idx", "redux": "sync add min max", "bar": "sync warp", "fence": "proxy async shared::cta",
    "ldmatrix": "sync aligned m8n8 x1 x2 x4 trans shared",
    "stmatrix": "sync aligned m8n8 x1 x2 x4 trans shared",
    "mma": "sync aligned m16n8k16 row col", "bra": "uni",
    "wgmma": "mma_async fence commit_group wait_group sync aligned m64n8k16 m64n16k16 m64n32k16 m64n64k16 m64n128k16",
}
COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
           "ge": np.greater_equal}
ROUND = {"rzi": np.trunc, "rpi": np.ceil}
ENDLESS = 10**7  # statements


def compare(how, a, b):
    """Of floats "lt" is false where one is NaN, "ltu" true; "num": neither is."""
    nan = np.isnan(a) | np.isnan(b) if a.dtype.kind == "f" else np.False_
    if how == "num":
        return ~nan
    return COMPARE[how[:2]](a, b) & ~nan | nan & how.endswith("u")


def convert(x, kind, rounding):
    """Numbers as another type; floats to integers as GPUs do it, NaN to 0 and what is too large to the largest."""
    x = ROUND[rounding](x) if rounding else x
    if kind[0] not in "us" or x.dtype.kind != "f":
        return x
    least, most = np.iinfo(KINDS[kind]).min, np.iinfo(KINDS[kind]).max
    inside = np.where((x > least) & (x < most), x, 0).astype(KINDS[kind])
    return np.where(x >= most, most, np.where(x <= least, least, inside))


# The program


@functools.lru_cache(64)
def parse(ptx):
    """The kernel's statements (predicate, opcode, operands; a jump's operand is where it leads), {register: type} and
    {parameter: type}."""
    head, body = ptx[ptx.index(".entry") :].split("\n{", 1)
    parameters = {name: kind for kind, name in re.findall(r"\.param \.(\w+)[^,\n]* (\w+)", head)}
    body = re.sub(r"//[^\n]*|^\s*\.(loc|pragma)[^\n]*$", "", body[: body.rindex("\n}")], flags=re.M)
    registers, code, labels, jumps, scope, scopes = {}, [], {}, [], (0,), 0
    for statement in body.split(";"):
        words = re.sub(r"\s+", " ", statement).strip()
        while found := re.match(r"(?:(\$?\w+):|[{}])\s*", words):
            words = words[found.end() :]
            if found[1]:
                if labels.setdefault((scope, found[1]), len(code)) != len(code):
                    raise NotImplementedError(f"label {found[1]} twice")
            elif found[0][0] == "{":  # of inline assembly, whose labels are its own
                scopes += 1
                scope += (scopes,)
            else:
                scope = scope[:-1]
        if declared := re.match(r"\.reg \.(\w+) (.*)", words):
            for name, count in re.findall(r"([%\w]+)(?:<(\d+)>)?", declared[2]):
                new = {f"{name}{i}": declared[1] for i in range(int(count))} if count else {name: declared[1]}
                if any(registers.get(register, declared[1]) != declared[1] for register in new):
                    raise NotImplementedError(f"registers {name} of two types")
                registers |= new
        elif words and not words.startswith("."):
            predicate, opcode, rest = re.match(r"(?:@(!?[%\w]+) )?(\S+) ?(.*)", words).groups()
            if opcode.startswith("bra"):
                jumps.append((len(code), scope, rest))
            code.append((predicate, opcode, [word.strip() for word in re.split(r",(?![^{\[]*[}\]])", rest)]))
    for at, scope, label in jumps:
        while scope and (scope, label) not in labels:
            scope = scope[:-1]
        if not scope:
            raise NotImplementedError(f"a jump to {label}, which is no label")
        code[at] = (*code[at][:2], [labels[scope, label]])
    return code, registers, parameters


def listed(operand):
    """The registers of { %r1, %r2 }, or of %r1."""
    return [word.strip() for word in operand.strip("{} ").split(",")]


class Machine:
    """Some programs of a launch: its PTX, threads of a program, bytes of shared memory, the grid, and the arguments."""

    def __init__(self, ptx, threads, shared, programs, grid, arguments, memory, counting=False):
        self.code, registers, parameters = parse(ptx)
        self.memory, self.counting, n = memory, counting, threads * len(programs)
        self.registers = {name: np.zeros(n, KINDS[kind.replace("f", "b")]) for name, kind in registers.items()}
        given = itertools.zip_longest(parameters.items(), arguments, fillvalue=0)  # Triton adds two, which are not read
        self.parameters = {name: encode(np.array([x]), kind) if kind == "f32" else np.array([x % 2**64], "u8")
                           for (name, kind), x in given}
        self.thread = np.arange(n)
        self.program, self.warp, self.lane = self.thread // threads, self.thread // 32, self.thread % 32
        self.shared = Shared(shared, len(programs), n, counting)
        self.special = {"%tid.x": self.thread % threads, "global_smem": np.zeros(1, "u8")}
        for axis, place, extent in zip("zyx", np.unravel_index(programs, grid[::-1]), grid[::-1], strict=True):
            self.special |= {f"%ctaid.{axis}": place[self.program], f"%nctaid.{axis}": np.array([extent])}
        self.steps = [self.bind(*statement) for statement in self.code]

    def read(self, operand, kind):
        """Numbers [threads], or [1] where they are the same for all."""
        if operand in self.registers:
            bits = self.registers[operand]
            return decode(bits if bits.itemsize == size_of(kind) else bits.astype(f"u{size_of(kind)}"), kind)
        return self.special[operand].astype(KINDS[kind]) if operand in self.special else constant(operand, kind)

    def read_all(self, operand, kind):
        return np.broadcast_to(self.read(operand, kind), len(self.thread))

    def write(self, operand, kind, x, mask):
        if operand == "_":
            return
        register, bits = self.registers[operand], encode(x, kind)
        if kind[0] == "s" and bits.itemsize < register.itemsize:
            bits = bits.view(KINDS[kind]).astype(f"i{register.itemsize}").view(register.dtype)
        np.copyto(register, bits.astype(register.dtype), where=True if mask is None else mask)

    def address(self, operand):
        """A function that gives the addresses of [ %rd1 + 16 ]."""
        name, offset = re.fullmatch(r"\[ ?([%$\w]+)(?: ?\+ ?(-?\d+))? ?\]", operand).groups()
        base = self.registers.get(name, self.special.get(name))
        offset = np.array(int(offset or 0) % 256**base.itemsize, base.dtype)
        return lambda: np.broadcast_to(base + offset, len(self.thread))

    def lanes(self, mask):
        return self.thread if mask is None else np.flatnonzero(mask)

    def whole(self, mask, threads=32):
        """Fault where only a part of a warp, or of four, does what all have to do together."""
        if mask is not None and (mask.reshape(-1, threads).any(1) != mask.reshape(-1, threads).all(1)).any():
            raise Fault("a part of a warp does what all of it has to do together")

    def access(self, address, width, lanes, matrices=0):
        """The access of some threads to shared memory: places [n, width] and warps [n, 1]."""
        self.shared.count(address, width, lanes, matrices)
        return self.shared.places(address, width, self.program[lanes]), self.warp[lanes, None].astype("i4")

    # Statements. Each method returns a function of the mask of threads (None: all of them), or None: it is not known.

    def bind(self, predicate, opcode, operands):
        name, *parts = opcode.split(".")
        make = getattr(self, f"do_{name}", functools.partial(self.operate, name) if name in OPERATIONS else None)
        strange = {*parts} - {*KINDS, *MODIFIERS.get(name, "").split()}
        run = make(parts, operands) if make and not strange else None
        if make is None and self.counting:  # tensor memory: as if there were nothing to wait for
            ready = [word for word in operands[:1] if self.registers.get(word, np.zeros(0)).dtype == bool]
            run = (lambda mask: self.write(ready[0], "pred", True, mask)) if ready else lambda mask: None
        if run is None:
            raise NotImplementedError(f"{opcode} {', '.join(operands)}")
        if predicate is None or name in ("bra", "ret"):
            return run
        if name == "bar":
            raise NotImplementedError("a barrier under a predicate")

        def guarded(mask):
            active = self.holds(predicate) if mask is None else self.holds(predicate) & mask
            if active.any():
                run(None if active.all() else active)

        return guarded

    def holds(self, predicate):
        value = self.registers[predicate.lstrip("!")]
        return ~value if predicate[0] == "!" else value.copy()

    def operate(self, name, parts, operands):
        kind, (target, *sources) = next(part for part in parts[::-1] if part in KINDS), operands
        wide = kind[0] + str(2 * int(kind[1:])) if "wide" in parts else kind
        places = dict(shl=1, shr=1, bfe=2, bfi=2).get(name, 0)  # the last operands, which are numbers of bits
        function, kinds = OPERATIONS[name], [kind] * (len(sources) - places) + ["u32"] * places
        if name in ("mul", "mad"):
            kinds[2:] = [wide] * (len(sources) - 2)
            function = functools.partial(multiply, high="hi" in parts, wide="wide" in parts)

        def run(mask):
            x = [self.read(source, of) for source, of in zip(sources, kinds, strict=True)]
            y = function(*map(flush, x)) if "ftz" in parts else function(*x)
            y = blur(y) if {"approx", "full"} & {*parts} else y
            self.write(target, wide, flush(y) if "ftz" in parts else y, mask)

        return run

    def do_mov(self, parts, operands):
        (target, source), kind = operands, parts[-1]
        names = listed(source if source[0] == "{" else target)
        part = f"b{8 * size_of(kind) // len(names)}" if len(names) > 1 else kind

        def run(mask):
            if target[0] == "{":  # in pieces
                pieces = np.ascontiguousarray(self.read_all(source, kind)).view(KINDS[part]).reshape(-1, len(names))
                for i, name in enumerate(names):
                    self.write(name, part, pieces[:, i], mask)
            elif source[0] == "{":  # out of pieces
                pieces = np.stack([self.read_all(name, part) for name in names], 1)
                self.write(target, kind, pieces.view(KINDS[kind]).reshape(-1), mask)
            else:
                self.write(target, kind, self.read(source, kind), mask)

        return run

    def do_cvt(self, parts, operands):
        (target, *sources), (to, kind) = operands, [part for part in parts if part in KINDS]
        rounding = next((part for part in parts if part in ROUND), None)

        def run(mask):
            x = [self.read(source, kind) for source in sources]
            x = np.stack(np.broadcast_arrays(*x[::-1]), 1) if to.endswith("x2") else x[0]  # the last is the lower half
            self.write(target, to, convert(x, to, rounding), mask)

        return run

    def do_setp(self, parts, operands):
        (target, a, b), how, kind = operands, parts[0], parts[-1]
        return lambda mask: self.write(target, "pred", compare(how, self.read(a, kind), self.read(b, kind)), mask)

    def do_selp(self, parts, operands):
        target, a, b, condition = operands
        kind = parts[-1].replace("f", "b")  # as bits: constants are written as such
        return lambda mask: self.write(
            target, kind, np.where(self.read(condition, "pred"), self.read(a, kind), self.read(b, kind)), mask)

    def do_ld(self, parts, operands):
        (target, source), kind = operands, parts[-1]
        if parts[0] == "param":
            value = self.parameters[source.strip("[] ")]
            return lambda mask: self.write(target, kind, value.astype(f"u{size_of(kind)}").view(KINDS[kind]), mask)
        if parts[0] in KINDS:  # generic: shared memory or global
            return None
        names, where = listed(target), self.address(source)
        width = size_of(kind) * len(names)

        def run(mask):
            lanes = self.lanes(mask)
            address = where()[lanes]
            if parts[0] != "global":
                places, warp = self.access(address, width, lanes)
                self.shared.look(places, warp)
                data = self.shared.bytes[places]
            else:
                data = self.memory.read(address, width)
            pieces = np.zeros((len(self.thread), len(names)), KINDS[kind])
            pieces[lanes] = np.ascontiguousarray(data).view(KINDS[kind])
            for i, name in enumerate(names):
                self.write(name, kind, pieces[:, i], mask)

        return run

    def do_st(self, parts, operands):
        if parts[0] in KINDS:
            return None
        names, where, kind = listed(operands[1]), self.address(operands[0]), parts[-1].replace("f", "b")

        def run(mask):
            lanes = self.lanes(mask)
            address, data = where()[lanes], np.stack([self.read_all(name, kind)[lanes] for name in names], 1).view("u1")
            if parts[0] != "global":
                places, warp = self.access(address, data.shape[1], lanes)
                self.shared.store(places, data, warp)
            else:
                self.memory.write(address, data)

        return run

    def do_cp(self, parts, operands):
        """Asynchronous copies of `width` bytes, or, where there is nothing to copy, of so many zeros."""
        if "commit_group" in parts:
            return lambda mask: np.add.at(self.shared.group, self.lanes(mask), 1)
        if "wait_group" in parts:
            return lambda mask: self.shared.land(int(operands[0]), self.lanes(mask))
        target, source, width, *some = operands
        target, source, width = self.address(target), self.address(source), int(width, 0)

        def run(mask):
            lanes = self.lanes(mask)
            size = (self.read_all(some[0], "u32") if some else np.full(len(self.thread), width))[lanes]
            there = size > 0
            if (size[there] != width).any():
                raise NotImplementedError("a copy of a part")
            data = np.zeros((len(lanes), width), "u1")
            data[there] = self.memory.read(source()[lanes][there], width)
            places, warp = self.access(target()[lanes], width, lanes)
            self.shared.copy(places, data, warp, lanes)

        return run

    def do_shfl(self, parts, operands):
        target, source, by, bounds, _ = operands

        def run(mask):
            self.whole(mask)
            b, c = self.read(by, "u32").astype("i8") & 31, self.read(bounds, "u32").astype("i8")
            segment, clamp = c >> 8 & 31, c & 31
            most = self.lane & segment | clamp & ~segment
            there = dict(up=self.lane - b, bfly=self.lane ^ b, idx=self.lane & segment | b & ~segment)[parts[1]]
            there = np.where(there >= most if parts[1] == "up" else there <= most, there, self.lane)
            self.write(target, "b32", self.read_all(source, "b32")[self.warp * 32 + there], mask)

        return run

    def do_redux(self, parts, operands):
        reduce, kind, (target, source, _) = dict(add=np.sum, min=np.min, max=np.max)[parts[1]], parts[-1], operands

        def run(mask):
            self.whole(mask)
            self.write(target, kind, reduce(self.read_all(source, kind).reshape(-1, 32), axis=1).repeat(32), mask)

        return run

    def do_bra(self, parts, operands):
        return lambda mask: None  # `run` jumps and ends

    do_ret = do_fence = do_bra

    def do_bar(self, parts, operands):
        return (lambda mask: None) if "warp" in parts or operands == ["0"] else None  # for which `run` waits

    def do_trap(self, parts, operands):
        def run(mask):
            raise Fault("an assertion of the kernel failed")

        return run

    def tiles(self, parts):
        """How many 8 x 8 matrices of 16 bits ldmatrix and stmatrix move, and whether transposed."""
        return next(int(part[1]) for part in parts if re.fullmatch(r"x\d", part)), "trans" in parts

    def do_ldmatrix(self, parts, operands):
        (n, transposed), names, where = self.tiles(parts), listed(operands[0]), self.address(operands[1])

        def run(mask):
            self.whole(mask)
            lanes = self.lanes(mask)
            lanes = lanes[lanes % 32 < 8 * n]  # whose addresses are those of rows
            places, warp = self.access(where()[lanes], 16, lanes, n)
            self.shared.look(places, warp)
            tiles = self.shared.bytes[places].view("u2").reshape(-1, n, 8, 8)
            pairs = np.ascontiguousarray(tiles.swapaxes(2, 3) if transposed else tiles).view("u4").reshape(-1, n, 32)
            whole = np.zeros((len(self.thread) // 32, n, 32), "u4")
            whole[np.unique(lanes // 32)] = pairs
            for i, name in enumerate(names):
                self.write(name, "b32", whole[:, i].reshape(-1), mask)

        return run

    def do_stmatrix(self, parts, operands):
        (n, transposed), names, where = self.tiles(parts), listed(operands[1]), self.address(operands[0])

        def run(mask):
            self.whole(mask)
            lanes = self.lanes(mask)
            tiles = np.stack([self.registers[name][lanes].reshape(-1, 32) for name in names], 1).view("u2")
            tiles = tiles.reshape(-1, n, 8, 8)
            tiles = np.ascontiguousarray(tiles.swapaxes(2, 3) if transposed else tiles)
            lanes = lanes[lanes % 32 < 8 * n]
            places, warp = self.access(where()[lanes], 16, lanes, n)
            self.shared.store(places, tiles.view("u1").reshape(-1, 16), warp)

        return run

    # Tensor cores. A thread g * 4 + t of a warp has, in every register, columns 2 t and 2 t + 1 of row g.

    def fragment(self, names, kind):
        """Operands of 16 bits in registers, float64 [warps, g, t, registers, 2]."""
        bits = np.stack([self.registers[name] for name in names], 1)
        return decode(bits.view("u2"), kind).reshape(-1, 8, 4, len(names), 2).astype("f8")

    def left(self, names, kind):
        """The left operand [warps, 16, 16]: registers are rows g and g + 8, then the same of columns from 8 on."""
        return self.fragment(names, kind).reshape(-1, 8, 4, 2, 2, 2).transpose(0, 4, 1, 3, 2, 5).reshape(-1, 16, 16)

    def accumulate(self, names, before, product, mask):
        """product [warps, 16, N], plus numbers `before` of each register, to registers: rows g and g + 8 of 8 columns,
        then the next 8."""
        product = product.reshape(-1, 2, 8, product.shape[2] // 8, 4, 2).transpose(0, 2, 4, 3, 1, 5)
        product = product.reshape(len(self.thread), -1)
        for i, (name, old) in enumerate(zip(names, before, strict=True)):
            self.write(name, "f32", product[:, i] + old, mask)

    def do_mma(self, parts, operands):
        names, a, b, sums = map(listed, operands)
        if parts[-1] != "f32":
            return None

        def run(mask):
            self.whole(mask)
            right = self.fragment(b, parts[-2]).transpose(0, 3, 2, 4, 1).reshape(-1, 16, 8)
            before = [self.read(name, "f32") for name in sums]
            self.accumulate(names, before, self.left(a, parts[-2]) @ right, mask)

        return run

    def do_wgmma(self, parts, operands):
        if parts[0] in ("fence", "commit_group"):
            return lambda mask: None
        if parts[0] == "wait_group":
            return (lambda mask: self.finish(mask)) if operands == ["0"] else None
        (names, a, b, more, *_), columns, kind = operands, int(re.search(r"n(\d+)k16", parts[3])[1]), parts[-1]
        names, transposed = listed(names), [word == "1" for word in operands[6:]]  # operands in shared memory
        if parts[-3] != "f32" or operands[4:6] != ["1", "1"]:
            return None

        def run(mask):
            self.whole(mask, 128)
            group = np.ones(len(self.thread) // 128, bool) if mask is None else mask[::128]
            left = (self.left(listed(a), kind).reshape(-1, 64, 16) if a[0] == "{" else
                    self.operand(a, 64, transposed[0], kind, group))
            product = left @ self.operand(b, columns, transposed[-1], kind, group).swapaxes(1, 2)
            keep = self.read(more, "pred")  # else the product replaces the sums
            before = [np.where(keep, self.read(name, "f32"), 0) for name in names]
            self.accumulate(names, before, product.reshape(-1, 16, columns), mask)

        return run

    def operand(self, name, rows, transposed, kind, group):
        """float64 [groups of four warps, rows, 16] of what a matrix descriptor tells of; zeros for other groups."""
        every = self.registers[name][::128][group]
        start, lead, stride = ((every >> np.uint64(at) & np.uint64(0x3FFF)).astype("i8")[:, None, None] << 4
                               for at in (0, 16, 32))
        modes, r, k = every >> np.uint64(49), np.arange(rows)[:, None], np.arange(16)
        mode = int(modes[0]) >> 13
        if (modes != mode << 13).any() or transposed and not mode:
            raise NotImplementedError("a matrix descriptor with a base offset, or of rows that are not swizzled")
        span = (16, 128, 64, 32)[mode]  # bytes that lie together
        if not transposed:  # along k
            at = start + r // 8 * stride + r % 8 * span + (2 * k if mode else k // 8 * lead + k % 8 * 2)
        else:  # along rows
            at = start + r // (span // 2) * lead + r % (span // 2) * 2 + k // 8 * stride + k % 8 * span
        at ^= at >> 3 & span - 16  # swizzled: bits 4 to 6 by bits 7 to 9, fewer where less lies together
        program = self.program[::128][group]
        places = self.shared.places(at.reshape(-1), 2, program.repeat(rows * 16)).reshape(len(every), -1)
        self.shared.look(places, SEVERAL)
        self.shared.busy[places] = True
        out = np.zeros((len(group), rows, 16))
        out[group] = decode(self.shared.bytes[places].view("u2"), kind).reshape(-1, rows, 16)
        return out

    def finish(self, mask):
        """Tensor cores have read their operands: these may be written from now on, after a barrier."""
        for program in np.unique(self.program[self.lanes(mask)]):
            mine = slice(program * self.shared.size, (program + 1) * self.shared.size)
            self.shared.seen[mine][self.shared.busy[mine]] = self.shared.epoch
            self.shared.reader[mine][self.shared.busy[mine]] = SEVERAL
            self.shared.busy[mine] = False

    # Running

    def run(self, limit=None):
        """Until all threads have returned, or `limit` statements were executed. Where threads part, those that are
        furthest behind go on, and wait for the others at barriers, which have to be the same for all."""
        left = ENDLESS if limit is None else limit
        groups, live = {0: np.ones(len(self.thread), bool)}, np.ones(len(self.thread), bool)

        def add(at, mask):
            if mask.any():
                groups[at] = groups[at] | mask if at in groups else mask

        with np.errstate(all="ignore"):
            while groups:
                ready = [at for at in groups if not self.code[at][1].startswith("bar.sync")]
                at = min(ready or groups)
                mask, others = groups.pop(at), min((x for x in ready if x != at), default=len(self.code))
                if not ready:
                    inside = np.unique(self.program[mask])
                    if (live & np.isin(self.program, inside) & ~mask).any():
                        raise Fault("threads of a program wait at different barriers")
                    self.shared.epoch += 1
                    at += 1
                whole = None if mask.all() else mask
                while True:
                    predicate, opcode, operands = self.code[at]
                    if at >= others or opcode.startswith("bar.sync"):
                        add(at, mask)
                        break
                    if (left := left - 1) < 0 and limit is not None:
                        return self
                    if left < 0:
                        raise Fault("the kernel does not end")
                    if opcode == "ret" or opcode.startswith("bra"):
                        goes = mask & self.holds(predicate) if predicate else mask
                        add(at + 1, mask & ~goes)
                        if opcode == "ret":
                            live &= ~goes
                        else:
                            add(operands[0], goes)
                        break
                    self.steps[at](whole)
                    at += 1
        if self.shared.coming.any() and not self.counting:
            raise Fault("the kernel ends before its copies have landed")
        return self


def conflicts(ptx, threads, shared, arguments, limit=16000):
    """(cycles of shared memory, the least that they could be) of the first `limit` statements that a program executes.
    arguments: the integers that the kernel gets; pointers are any multiples of 16."""
    machine = Machine(ptx, threads, shared, [0], (1, 1, 1), arguments, Anything(), counting=True).run(limit)
    return machine.shared.cycles, machine.shared.least


def install(target):
    """From now on kernels that are launched on CPU tensors are compiled for a GPU, and run here."""
    import triton
    from triton.runtime.jit import JITFunction

    triton.runtime.driver.set_active(FakeDriver(target))
    compile = JITFunction.run

    def run(self, *args, grid, warmup, **how):
        binary = compile(self, *args, grid=grid, warmup=True, **how)
        if not warmup:
            launch(binary, dict(zip(self.arg_names, args, strict=False)) | how, grid)
        return binary

    JITFunction.run = run


def launch(binary, given, grid):
    """Run all programs of a grid; given: {parameter: tensor or number}."""
    values = [given[name] for name, kind in binary.src.signature.items() if kind != "constexpr"]
    memory = Tensors([value for value in values if hasattr(value, "data_ptr")])
    values = [value.data_ptr() if hasattr(value, "data_ptr") else value for value in values]
    grid, threads = (*grid, 1, 1)[:3], 32 * binary.metadata.num_warps
    programs, many = np.arange(np.prod(grid)), max(TOGETHER // threads, 1)
    for first in range(0, len(programs), many):
        some = programs[first : first + many]
        Machine(binary.asm["ptx"], threads, binary.metadata.shared, some, grid, values, memory).run()
