"""Bank conflicts of a kernel compiled ahead of time: its PTX is followed for the threads of one program, integers only.

Shared memory has 32 banks of 4 bytes. A warp's access is served in phases of at most 128 bytes, and a phase takes as
many cycles as one bank has words to give (ldmatrix and stmatrix: a phase for each matrix, of eight rows of 16 bytes).
Integers that are loaded (a position, a seed) are taken for LOADED, floats for 0: few decide where a kernel reads.
What tensor cores read from shared memory by themselves (wgmma, tcgen05) is not counted.
"""

import collections
import re

import numpy as np

LOADED = 320  # a position some blocks into a cache
BINARY = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "shl": np.left_shift, "shr": np.right_shift, "min": np.minimum, "max": np.maximum,
    "div": lambda a, b: np.trunc(a / np.where(b == 0, 1, b)).astype(np.int64),
    "rem": lambda a, b: np.fmod(a, np.where(b == 0, 1, b)),
}
COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
           "ge": np.greater_equal}


def statements(ptx):
    """The kernel's statements, and at which of them its labels stand."""
    body = re.sub(r"//[^\n]*|^\s*\.loc[^\n]*$|^\s*\.pragma[^\n]*$", "", ptx[ptx.index("\n{") + 2 :], flags=re.M)
    code, labels = [], collections.defaultdict(list)  # those of inline assembly stand in several places
    for part in body.split(";"):
        words = part.replace("\n", " ").strip()
        while found := re.match(r"\s*(?:(\$?\w+):|[{}])\s*", words):
            words = words[found.end() :]
            if found[1]:
                labels[found[1]].append(len(code))
        if words and not words.startswith("."):
            code.append(re.sub(r"\s+", " ", words))
    return code, labels


def phases(opcode, text):
    """Bytes of a thread's access, and the lanes of every phase."""
    if "matrix" in opcode:
        return 16, [range(8 * i, 8 * i + 8) for i in range(int(re.search(r"\.x(\d)", opcode)[1]))]
    if opcode.startswith("cp"):
        width = int(re.search(r"\], (0x\w+)", text)[1], 16)
    else:
        vector = re.search(r"\.v(\d)", opcode)
        width = int(re.search(r"(\d+)$", opcode)[1]) // 8 * (int(vector[1]) if vector else 1)
    lanes = min(128 // width, 32)
    return width, [range(i, i + lanes) for i in range(0, 32, lanes)]


def cycles(ptx, threads, arguments, limit=16000):
    """(cycles of shared memory, the least that they could be) of the first `limit` statements that a program of so many
    threads executes. arguments: the integers that the kernel gets; pointers are any."""
    code, labels = statements(ptx)
    values, took, least, at = collections.defaultdict(lambda: np.zeros(threads, np.int64)), 0, 0, 0

    def value(word):
        if word == "%tid.x":
            return np.arange(threads)
        number = re.fullmatch(r"(-?\d+|0x[\da-fA-F]+)U?", word)
        return np.full(threads, int(number[1], 0)) if number else values[word]

    for _ in range(limit):
        if at == len(code) or code[at].endswith("ret"):
            break
        predicate, text = re.match(r"(?:@(!?%\w+) )?(.*)", code[at]).groups()
        at += 1
        active = np.ones(threads, bool)
        if predicate:
            active = (values[predicate.strip("!")] != 0) ^ predicate.startswith("!")
        opcode, _, rest = text.partition(" ")
        kind, number = opcode.split(".")[0], re.search(r"\.([bsu])(16|32|64)\b(?!.*\.(f|bf)\d)", opcode)
        words = [word.strip() for word in re.split(r",(?![^{\[]*[}\]])", rest)]
        if kind == "bra":
            assert active.all() or not active.any(), f"threads part at: {text}"
            places = labels[words[0]]
            at = min((place for place in places if place >= at), default=places[0]) if active.all() else at
        elif ".shared" in opcode and "[" in text:
            register, offset = re.search(r"\[ ?(%?\w+)(?: ?\+ ?(-?\d+))? ?\]", text).groups()
            address = values[register] + int(offset or 0)
            width, groups = phases(opcode, text)
            for warp in range(0, threads, 32):
                for group in groups:
                    lanes = [warp + i for i in group if active[warp + i]]
                    served = {int(address[i]) // 4 + w for i in lanes for w in range(max(width // 4, 1))}
                    took += max(collections.Counter(word % 32 for word in served).values(), default=0)
                    least += bool(lanes)
        elif opcode.startswith("ld.global") and re.fullmatch(r"\{ ?%\w+ ?\}", words[0]):
            values[words[0].strip("{} ")] = np.full(threads, LOADED)
        elif words[0].startswith(("{", "[")) or not words[0]:
            pass  # vectors of loaded or computed floats, stores, barriers
        else:
            new = np.zeros(threads, np.int64)
            given = [value(word) for word in words[1:]]
            if opcode.startswith("ld.param"):
                new += arguments[int(re.search(r"param_(\d+)", rest)[1])]
            elif kind == "setp" and number:
                new = COMPARE[opcode.split(".")[1].rstrip("u")](*given[:2]) + new
            elif kind == "selp" and number:
                new = np.where(given[2] != 0, given[0], given[1])
            elif kind == "mad" and number:
                new = given[0] * given[1] + given[2]
            elif kind in BINARY and (number or "pred" in opcode):
                new = BINARY[kind](given[0] & 0xFFFFFFFF if opcode == "shr.u32" else given[0], given[1])
            elif kind in ("mov", "cvt", "cvta") and not re.search(r"\.b?f\d", opcode):
                new = given[0]
            elif kind == "not":
                new = (given[0] == 0).astype(np.int64) if "pred" in opcode else ~given[0]
            elif kind == "neg" and number:
                new = -given[0]
            elif kind == "bfe":
                new = given[0] >> given[1] & (1 << given[2]) - 1
                if number[1] == "s":  # its highest bit is the sign
                    new = new - (new >> given[2] - 1 << given[2])
            if number and number[2] == "32" and "wide" not in opcode:
                new = (new + 2**31) % 2**32 - 2**31
            values[words[0]] = np.where(active, new, values[words[0]])
    return took, least
