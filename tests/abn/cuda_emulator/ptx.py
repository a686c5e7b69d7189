"""Translate the PTX that NVRTC emits into C++ for the emulator, one statement per instruction.

Registers are unsigned integers of their width, which every instruction reads as its own type. An instruction, or a form
of one, that is not known here is an error. Approximate instructions (ex2.approx and the like) are computed exactly, so
their last bits can differ from those of a device.
"""

import re

COORDINATES = {"tid": "emu::V.cur->tid", "ctaid": "emu::V.bid", "ntid": "emu::V.block", "nctaid": "emu::V.grid"}
SPECIAL = {f"%{name}.{axis}": f"{value}.{axis}" for name, value in COORDINATES.items() for axis in "xyz"}
COMPARISONS = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">", "hs": ">=",
}  # fmt: skip
LOGIC = {"and": ("&", "&&"), "or": ("|", "||"), "xor": ("^", "!=")}
# What a modifier of floating-point arithmetic may be; .rz is known for additions only.
ROUNDINGS = {"rn", "approx", "full", "ftz", "rz", "f32", "f64"}
SHARED = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.[bufs](\d+)\s+([\w$]+)(?:\[(\d+)\])?;")
PARAMETER = re.compile(r"\s*\.param\s+\.(\w+)(\s+\.ptr[\s.\w]*?)?\s+([\w$]+),?$")

PRELUDE = r"""
#include <limits>
#include "cuda_emu.h"
#include "cuda_bf16.h"
namespace p {
template <typename T, typename U> inline T as(U u) {
  T t;
  static_assert(sizeof t <= sizeof u, "");
  memcpy(&t, &u, sizeof t);
  return t;
}
template <int N> struct Unsigned;
template <> struct Unsigned<1> { typedef uint8_t type; };
template <> struct Unsigned<2> { typedef uint16_t type; };
template <> struct Unsigned<4> { typedef uint32_t type; };
template <> struct Unsigned<8> { typedef uint64_t type; };
template <typename T> inline auto raw(T v) { return as<typename Unsigned<sizeof(T)>::type>(v); }
inline float ftz(float v) { return v != 0.0f && fabsf(v) < 0x1p-126f ? copysignf(0.0f, v) : v; }
inline double ftz(double v) { return v; }
inline float toward_zero(double v) {
  const float f = (float)v;
  return fabs((double)f) > fabs(v) ? nextafterf(f, 0.0f) : f;
}
template <typename I, typename F> inline I to_integer(F v) {  // saturating, NaN to 0, as cvt does
  if (v != v) return 0;
  if (v <= (F)std::numeric_limits<I>::min()) return std::numeric_limits<I>::min();
  if (v >= (F)std::numeric_limits<I>::max()) return std::numeric_limits<I>::max();
  return (I)v;
}
inline uint64_t in_shared(uint64_t at, unsigned bytes, unsigned size, const char* site) {
  if (at + bytes > size) emu::trap(site);
  return at;
}
inline uint64_t in_global(uint64_t at, unsigned bytes, bool stored) {
  emu::count(at, bytes, stored);
  return at;
}
inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t select) {  // picks four of eight bytes
  const uint64_t both = (uint64_t)b << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t which = select >> (4 * i), byte = both >> (8 * (which & 7)) & 255;
    out |= (which & 8 ? (byte >> 7) * 255 : byte) << (8 * i);
  }
  return out;
}
inline uint32_t bfe(uint32_t v, uint32_t first, uint32_t bits) {
  first &= 255, bits &= 255;
  return (uint32_t)((uint64_t)v >> (first < 32 ? first : 32) & ((1ull << (bits < 32 ? bits : 32)) - 1));
}
template <typename T, int N> struct alignas(sizeof(T) * N) Vector { T v[N]; };
}
"""


class Unknown(Exception):
    """PTX that this translator does not support."""


def ctype(t: str) -> str:
    """C++ type of a PTX type: u32, f32, b64, pred ..."""
    if t == "pred":
        return "bool"
    if t[0] == "f":
        return {32: "float", 64: "double"}[int(t[1:])]
    return f"{'int' if t[0] == 's' else 'uint'}{t[1:]}_t"


def is_float(t: str) -> bool:
    return t[0] == "f"


def in_braces(operand: str) -> list[str]:
    return [part.strip() for part in operand.strip("{} ").split(",")]


class Entry:
    """One kernel: its parameters, its shared arrays, and the C++ statements of its body."""

    def __init__(self, parameters: dict[str, tuple[int, int]]) -> None:
        self.parameters = parameters  # name -> (offset, bytes)
        self.shared: dict[str, int] = {}  # name -> offset in the arena of `size` bytes
        self.size = 0
        self.widths: dict[str, int] = {}  # register prefix -> bits
        self.declarations: list[str] = []
        self.statements: list[str] = []

    def add_shared(self, found: re.Match) -> None:
        """Add a shared array to the entry. found: a match of SHARED."""
        self.size = -(-self.size // 16) * 16
        self.shared[found[3]] = self.size
        self.size += int(found[2]) // 8 * int(found[4] or 1)

    # ---- operands

    def width(self, register: str) -> int:
        if register in self.widths:
            return self.widths[register]
        found = re.match(r"%([a-z]+)\d+$", register)
        if not found:
            raise Unknown(f"register {register}")
        return self.widths[found[1]]

    def value(self, operand: str, t: str) -> str:
        """C++ expression of an operand, read as PTX type t."""
        operand, c = operand.strip(), ctype(t)
        if operand in SPECIAL:
            return f"({c}){SPECIAL[operand]}"
        if found := re.match(r"0[fF]([0-9a-fA-F]{8})$", operand):
            return f"p::as<{c}>(0x{found[1]}u)"
        if found := re.match(r"0[dD]([0-9a-fA-F]{16})$", operand):
            return f"p::as<{c}>(0x{found[1]}ull)"
        if re.match(r"(-?\d+|0x[0-9a-fA-F]+)U?$", operand):
            operand = operand.removesuffix("U")
            if is_float(t):
                raise Unknown(f"integer literal as {t}")
            if t == "pred":
                return f"({operand} != 0)"
            return "INT64_MIN" if operand == str(-(2**63)) else f"({c}){operand}ll"
        if re.match(r"!?%p\d+$", operand):
            return operand.replace("%", "r_")
        if operand.startswith("%"):
            register = operand.replace("%", "r_")
            return f"p::as<{c}>({register})" if is_float(t) else f"({c}){register}"
        if operand in self.shared:
            return f"({c}){self.shared[operand]}"
        if operand in self.parameters:
            return f"({c}){self.parameters[operand][0]}"
        raise Unknown(f"operand {operand}")

    def put(self, target: str, t: str, expression: str) -> str:
        target = target.strip()
        if re.match(r"%p\d+$", target):
            return f"{target.replace('%', 'r_')} = {expression};"
        if target.startswith("{"):
            parts = in_braces(target)
            width = int(t[1:]) // len(parts)
            moves = " ".join(
                f"{part.replace('%', 'r_')} = (uint{width}_t)(u >> {i * width});" for i, part in enumerate(parts)
            )
            return f"{{ const auto u = p::raw<{ctype(t)}>({expression}); {moves} }}"
        register = target.replace("%", "r_")
        if is_float(t):
            return f"{register} = p::raw<{ctype(t)}>({expression});"
        return f"{register} = (uint{self.width(target)}_t)({ctype(t)})({expression});"  # signed types extend their sign

    def address(self, operand: str, space: str, site: str, size: int, stored: bool) -> str:
        found = re.match(r"\[\s*([^+\]]+?)\s*(?:\+\s*(-?\d+))?\s*\]$", operand.strip())
        if not found:
            raise Unknown(f"address {operand}")
        base, offset = found[1], int(found[2] or 0)
        if space == "param":
            return f"(uintptr_t)(prm + {self.parameters[base][0] + offset})"
        if space == "shared":
            narrow = not (base.startswith("%") and self.width(base) == 64)
            at = f"(uint64_t){self.value(base, 'u32' if narrow else 'u64')} + {offset}"
            return f'(uintptr_t)shm + p::in_shared({at}, {size}, {self.size}, "{site}: outside shared memory")'
        if space == "global":
            return f"p::in_global({self.value(base, 'u64')} + {offset}, {size}, {str(stored).lower()})"
        raise Unknown(f"{space} memory")  # local memory would be a spill, generic an array that has lost its space

    # ---- instructions

    def instruction(self, text: str, line: int) -> None:
        condition = ""
        if found := re.match(r"@(!?)%(p\d+)\s+(.*)", text):
            condition, text = f"if ({found[1]}r_{found[2]}) ", found[3]
        operation, _, rest = text.partition(" ")
        operands = [a.strip() for a in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest)]
        statement = self.emit(operation, operands, f"{operation} at PTX line {line}")
        self.statements.append(f"  {condition}{{ {statement} }}  // {line}: {text[:60]}")

    def emit(self, operation: str, a: list[str], site: str) -> str:
        base, *modifiers = operation.split(".")
        if base == "ret":
            return "return;"
        if base == "bra":
            return f"goto {a[0].replace('$', 'L')};"
        if operation == "bar.sync" and a == ["0"]:
            return f'emu::barrier("{site}");'
        method = getattr(self, f"do_{base}", None)
        if method is None or "sat" in modifiers:
            raise Unknown(operation)
        return str(method(operation, modifiers, modifiers[-1], a, site))

    def do_mov(self, operation, modifiers, t, a, site):
        if a[1].startswith("{"):
            parts = in_braces(a[1])
            width = int(t[1:]) // len(parts)
            pieces = " | ".join(
                f"((uint{t[1:]}_t)(uint{width}_t){self.value(part, f'b{width}')} << {i * width})"
                for i, part in enumerate(parts)
            )
            return self.put(a[0], t, pieces)
        return self.put(a[0], t, self.value(a[1], t))

    def do_cvta(self, operation, modifiers, t, a, site):
        if modifiers[:2] != ["to", "global"]:
            raise Unknown(operation)
        return self.put(a[0], "u64", self.value(a[1], "u64"))

    def access(self, modifiers, t):
        """(memory space, elements, C++ type of the memory, bytes)"""
        space = next((m for m in modifiers if m in ("param", "global", "shared", "local", "const")), "generic")
        count = next((int(m[1]) for m in modifiers if re.match(r"v[248]$", m)), 1)
        return space, count, f"p::Vector<uint{t[1:]}_t, {count}>", int(t[1:]) // 8 * count

    def do_ld(self, operation, modifiers, t, a, site):
        space, _, memory, size = self.access(modifiers, t)
        moves = " ".join(
            self.put(part, t, f"p::as<{ctype(t)}>(u.v[{i}])" if is_float(t) else f"({ctype(t)})u.v[{i}]")
            for i, part in enumerate(in_braces(a[0]))
        )
        return f"const {memory} u = *(const {memory}*)({self.address(a[1], space, site, size, False)}); {moves}"

    def do_st(self, operation, modifiers, t, a, site):
        space, _, memory, size = self.access(modifiers, t)
        values = ", ".join(
            f"p::raw<{ctype(t)}>({self.value(part, t)})" if is_float(t) else f"(uint{t[1:]}_t){self.value(part, t)}"
            for part in in_braces(a[1])
        )
        return f"*({memory}*)({self.address(a[0], space, site, size, True)}) = {memory}{{{{{values}}}}};"

    def do_shfl(self, operation, modifiers, t, a, site):
        if operation != "shfl.sync.bfly.b32":
            raise Unknown(operation)
        target, _, predicate = a[0].partition("|")
        lanes = f"const int lane = (int)emu::V.cur->lane, other = lane ^ ((int){self.value(a[2], 'u32')} & 31);"
        lanes += f' if ({self.value(a[3], "u32")} != 31) emu::trap("{site}: a part of a warp");'
        call = f'emu::shuffle({self.value(a[4], "u32")}, {self.value(a[1], "b32")}, other, "{site}");'
        done = self.put(target, "b32", "(uint32_t)emu::V.cur->out")
        return f"{lanes} {call} {done}" + (f" {predicate.strip().replace('%', 'r_')} = true;" if predicate else "")

    def do_setp(self, operation, modifiers, t, a, site):
        comparison = modifiers[0]
        logic = next((m for m in modifiers[1:] if m in LOGIC), None)
        x, y = self.flushed(a[1], t, modifiers), self.flushed(a[2], t, modifiers)
        unordered = f"(std::isnan({x}) || std::isnan({y}))"
        if comparison in ("nan", "num"):
            test = unordered if comparison == "nan" else f"!{unordered}"
        elif is_float(t) and comparison.endswith("u") and comparison[:-1] in COMPARISONS:
            test = f"({unordered} || {x} {COMPARISONS[comparison[:-1]]} {y})"
        elif is_float(t) and comparison == "ne":
            test = f"(!{unordered} && {x} != {y})"
        else:
            test = f"({x} {COMPARISONS[comparison]} {y})"
        if logic:
            test = f"({test} {LOGIC[logic][1]} {self.value(a[3], 'pred')})"
        return self.put(a[0], "pred", test)

    def do_bytes(self, operation, modifiers, t, a, site):
        if operation not in ("prmt.b32", "bfe.u32"):
            raise Unknown(operation)
        x = ", ".join(self.value(operand, "u32") for operand in a[1:])
        return self.put(a[0], t, f"p::{operation.partition('.')[0]}({x})")

    do_prmt = do_bfe = do_bytes

    def do_selp(self, operation, modifiers, t, a, site):
        return self.put(a[0], t, f"{self.value(a[3], 'pred')} ? {self.value(a[1], t)} : {self.value(a[2], t)}")

    def do_logic(self, operation, modifiers, t, a, site):
        base = operation.partition(".")[0]
        return self.put(a[0], t, f"{self.value(a[1], t)} {LOGIC[base][t == 'pred']} {self.value(a[2], t)}")

    do_and = do_or = do_xor = do_logic

    def do_not(self, operation, modifiers, t, a, site):
        return self.put(a[0], t, f"{'!' if t == 'pred' else '~'}{self.value(a[1], t)}")

    def do_shl(self, operation, modifiers, t, a, site):
        x, by = self.value(a[1], t), self.value(a[2], "u32")
        over = f"({x} < 0 ? -1 : 0)" if t[0] == "s" else "0"
        sign = "<<" if operation.startswith("shl") else ">>"
        return self.put(a[0], t, f"{by} >= {t[1:]}u ? ({ctype(t)}){over} : ({ctype(t)})({x} {sign} {by})")

    do_shr = do_shl

    def flushed(self, operand, t, modifiers):
        value = self.value(operand, t)
        return f"p::ftz({value})" if "ftz" in modifiers else value

    def do_arithmetic(self, operation, modifiers, t, a, site):
        base = operation.partition(".")[0]
        return self.float_op(base, operation, modifiers, t, a) if is_float(t) else self.int_op(base, modifiers, t, a)

    do_add = do_sub = do_mul = do_mad = do_fma = do_div = do_rem = do_min = do_max = do_arithmetic
    do_abs = do_neg = do_rcp = do_sqrt = do_ex2 = do_arithmetic

    def float_op(self, base, operation, modifiers, t, a):
        if not set(modifiers) <= ROUNDINGS:
            raise Unknown(operation)
        x = [self.flushed(operand, t, modifiers) for operand in a[1:]]
        f = "f" if t == "f32" else ""
        if base in ("add", "sub", "mul", "div"):
            sign = {"add": "+", "sub": "-", "mul": "*", "div": "/"}[base]
            result = f"{x[0]} {sign} {x[1]}"
            if "rz" in modifiers:
                if t != "f32" or base not in ("add", "sub"):
                    raise Unknown(operation)
                result = f"p::toward_zero((double){x[0]} {sign} (double){x[1]})"
        elif "rz" in modifiers:
            raise Unknown(operation)
        elif base == "fma":
            result = f"__builtin_fma{f}({x[0]}, {x[1]}, {x[2]})"
        elif base in ("min", "max"):
            result = f"f{base}{f}({x[0]}, {x[1]})"
        else:
            one = "1.0f" if t == "f32" else "1.0"
            result = {
                "abs": f"fabs{f}({x[0]})", "neg": f"-{x[0]}", "rcp": f"{one} / {x[0]}", "sqrt": f"sqrt{f}({x[0]})",
                "ex2": f"exp2{f}({x[0]})",
            }[base]  # fmt: skip
        return self.put(a[0], t, f"p::ftz({result})" if "ftz" in modifiers else result)

    def int_op(self, base, modifiers, t, a):
        unsigned, width = f"u{t[1:]}", int(t[1:])
        u = [self.value(operand, unsigned) for operand in a[1:]]  # wraps around, as the device does
        if base in ("add", "sub"):
            return self.put(a[0], t, f"({ctype(unsigned)})({u[0]} {'+' if base == 'add' else '-'} {u[1]})")
        if base in ("mul", "mad"):
            if "wide" in modifiers:
                wide = f"{t[0]}{2 * width}"
                product = f"({ctype(wide)}){self.value(a[1], t)} * ({ctype(wide)}){self.value(a[2], t)}"
                if base == "mul":
                    return self.put(a[0], wide, product)
                added = self.value(a[3], f"u{2 * width}")
                return self.put(a[0], wide, f"({ctype(f'u{2 * width}')})({product}) + {added}")
            if "lo" not in modifiers:
                raise Unknown(f"{base} {modifiers}")
            product = f"({ctype(unsigned)})({u[0]} * {u[1]})"
            return self.put(a[0], t, product if base == "mul" else f"{product} + {u[2]}")
        if base == "neg":
            return self.put(a[0], t, f"({ctype(unsigned)})(0 - {u[0]})")
        x = [self.value(operand, t) for operand in a[1:]]
        if base in ("div", "rem"):
            return self.put(a[0], t, f"{x[0]} {'/' if base == 'div' else '%'} {x[1]}")
        if base in ("min", "max"):
            return self.put(a[0], t, f"{x[0]} {'<' if base == 'min' else '>'} {x[1]} ? {x[0]} : {x[1]}")
        raise Unknown(f"{base} {modifiers}")

    def do_cvt(self, operation, modifiers, t, a, site):
        to, of = [m for m in modifiers if re.match(r"[busf]\d+$|bf16$", m)]
        rounding = next((m for m in modifiers if re.match(r"r[nzmp]i?$", m)), None)
        if of == "f32" and to in ("f16", "bf16") and rounding == "rn":
            value = self.flushed(a[1], "f32", modifiers)
            return self.put(a[0], "b16", f"emu::float_to_{'half' if to == 'f16' else 'bf16'}({value})")
        if of == "f16" and to == "f32":
            return self.put(a[0], "f32", f"emu::half_to_float((uint16_t){self.value(a[1], 'b16')})")
        if of == "bf16" and to == "f32":
            return self.put(a[0], "f32", f"p::as<float>((uint32_t){self.value(a[1], 'b16')} << 16)")
        if {to, of} & {"f16", "bf16"}:
            raise Unknown(operation)
        if is_float(of):
            value = self.flushed(a[1], of, modifiers)
            if rounding and rounding.endswith("i"):
                whole = {"rni": "nearbyint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}[rounding]
                value = f"{whole}({value})"
            if is_float(to):
                return self.put(a[0], to, f"({ctype(to)}){value}")
            return self.put(a[0], to, f"p::to_integer<{ctype(to)}>({value})")
        return self.put(a[0], to, f"({ctype(to)}){self.value(a[1], of)}")

    # ---- a body

    def translate(self, body: list[str], first_line: int) -> None:
        text = ""
        for line, raw in enumerate(body, first_line):
            text = f"{text} {re.sub(r'//.*', '', raw).strip()}".strip()
            while text:
                if found := re.match(r"(\$?[\w$]+):\s*(?!:)", text):
                    self.statements.append(f" {found[1].replace('$', 'L')}:;")
                elif found := re.match(r"\.reg\s+\.(\w+)\s+%(\w+?)<(\d+)>;\s*", text):
                    width = 1 if found[1] == "pred" else int(found[1][1:])
                    self.widths[found[2]] = width
                    kind = "bool" if width == 1 else f"uint{width}_t"
                    registers = ", ".join(f"r_{found[2]}{i} = 0" for i in range(int(found[3])))
                    self.declarations.append(f"  {kind} {registers};")
                elif found := re.match(r"\.reg\s+\.b(\d+)\s+(%[a-z]+);\s*", text):  # of an inner block
                    self.widths[found[2]] = int(found[1])
                    declaration = f"  uint{found[1]}_t {found[2].replace('%', 'r_')} = 0;"
                    if declaration not in self.declarations:
                        self.declarations.append(declaration)
                elif found := re.match(SHARED.pattern + r"\s*", text):
                    self.add_shared(found)
                elif found := re.match(r"\.(loc|file|pragma)\b[^;\n]*;?\s*|\{\s*(?!%)|\}\s*", text):
                    pass
                else:
                    if ";" not in text:
                        break
                    found = re.match(r"([^;]*);\s*", text)
                    assert found
                    self.instruction(re.sub(r"\s+", " ", found[1].strip()), line)
                text = text[found.end() :]
        if text:
            raise Unknown(f"unfinished: {text}")


def kind(t: str, pointer: bool) -> int:
    """As emu::describe."""
    return 100 * (2 if pointer else 1 if is_float(t) else 0) + int(t[1:]) // 8


def translate(ptx: str) -> tuple[str, list[str]]:
    """(C++ text, mangled names of its kernels in the order of their numbers)"""
    lines, out = ptx.splitlines(), [PRELUDE]
    names: list[str] = []
    arrays = {found[3]: found for found in map(SHARED.match, lines) if found}
    declares_pointers = any(".ptr" in line for line in lines)  # newer compilers do
    at = 0
    while at < len(lines):
        header = re.match(r"(?:\.(?:weak|visible)\s+)*\.(entry|func)\s+([\w$]+)\s*\(", lines[at])
        at += 1
        if not header:
            continue
        if header[1] == "func":
            raise Unknown(f"a device function left in the PTX: {header[2]}")
        parameters: dict[str, tuple[int, int]] = {}
        kinds, end = [], 0
        while not lines[at].startswith(")"):
            found = PARAMETER.match(lines[at])
            if not found:
                raise Unknown(f"parameter {lines[at]}")
            size = int(found[1][1:]) // 8
            end = -(-end // size) * size
            parameters[found[3]] = end, size
            kinds.append(kind(found[1], bool(found[2])) if declares_pointers else -size)
            end += size
            at += 1
        while not lines[at].startswith("{"):
            at += 1
        last = lines.index("}", at)
        body = lines[at + 1 : last]
        # Only the shared arrays that this entry names are its own.
        mentioned = set(re.findall(r"[\w$]+", "\n".join(body)))
        entry = Entry(parameters)
        for name, found in arrays.items():
            if name in mentioned:
                entry.add_shared(found)
        entry.translate(body, at + 2)
        k, at = len(names), last
        names.append(header[2])
        copies = "".join(
            f" memcpy(prm + {offset}, a[{n}], {bytes_});" for n, (offset, bytes_) in enumerate(parameters.values())
        )
        listed = " ".join(f"o[{n}] = {value};" for n, value in enumerate(kinds))
        out += [
            f"static void ptx_{k}(const unsigned char* prm) {{",
            f"  alignas(16) __shared__ unsigned char shm[{max(entry.size, 1)}];",
            "  (void)shm;",
            *entry.declarations,
            *entry.statements,
            "}",
            f"static void entry_{k}(void** a) {{",
            f"  alignas(16) unsigned char prm[{max(end, 1)}];{copies} ptx_{k}(prm);",
            "}",
            f'extern "C" int emu_run_{k}(void** a, const int* d, int order, long long only) {{',
            f"  return emu::launch(&entry_{k}, a, d, order, only);",
            "}",
            f'extern "C" int emu_parameters_{k}(int* o) {{ {listed} return {len(kinds)}; }}',
        ]
    return "\n".join(out) + "\n", names
