"""Translates the PTX that nvcc makes of a .cu file into C++, which runs on a CPU.

    python tools/ptx_to_cpp.py kernels.ptx OUT PARTS [CHOICE]

writes OUT.0.cpp to OUT.<PARTS - 1>.cpp with the kernels whose mangled names match the pattern CHOICE.
The instructions are implemented in tests/cpp/ptx_on_cpu.h; one that is missing there does not compile. Only
the PTX that these kernels use is known; anything else is an error.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

# of a register or an instruction, by its kind and bits: .u32, .f64
CPP_TYPE = {
    **{f"{kind}{bits}": f"uint{bits}_t" for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": f"int{bits}_t" for bits in (8, 16, 32, 64)},
    "f32": "float",
    "f64": "double",
    "f16": "Half",
    "bf16": "Brain",
    "tf32": "Tf32",
    "pred": "bool",
}
REGISTER = {"b16": "uint16_t", "b32": "uint32_t", "f32": "uint32_t", "b64": "uint64_t", "f64": "uint64_t"}
SPECIAL = {"ctaid": "blockIdx", "nctaid": "gridDim", "tid": "threadIdx", "ntid": "blockDim"}
PLACE = {  # of an address, by the state space
    "global": "Global{{{}}}",
    "param": "Parameter{{{}}}",
    "shared": "Shared{{block, {}}}",
    "shared::cluster": "Cluster{{{}}}",
}
# of operands that are not of the instruction's type
LATER_TYPES = {"shl": {2: "uint32_t"}, "shr": {2: "uint32_t"}, "bfi": {3: "uint32_t", 4: "uint32_t"}}
LATER_TYPES |= {"selp": {3: "bool"}}


class UnknownPtx(Exception):
    """A statement that this program does not know."""


def split_operands(text: str) -> list[str]:
    """'%r1, {%r2, %r3}, [%rd4+8]' to its three operands."""
    return [o.strip() for o in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", text)]


def is_vector(operand: str) -> bool:
    return operand.startswith("{")


def elements(operand: str) -> list[str]:
    return split_operands(operand.strip("{}")) if is_vector(operand) else [operand]


class Kernel:
    """One .entry: its C++ function."""

    def __init__(self, name: str, body: str, strings: dict[str, str], shared: dict[str, int]):
        self.name, self.strings, self.shared = name, strings, shared
        self.registers: dict[str, str] = {}  # the type of each in C++
        self.call: dict[str, str] = {}  # parameters of the next call
        self.lines: list[str] = []
        for statement in self.statements(body):
            self.translate(statement)

    @staticmethod
    def statements(body: str):
        for piece in re.findall(r"\$L\w+:|[^;]+;", body):
            piece = re.sub(r"^[\s{}]+", "", piece)
            while label := re.match(r"(\$L\w+:)[\s{}]*", piece):
                yield label[1]
                piece = piece[label.end() :]
            if piece.strip(" ;"):
                yield " ".join(piece.rstrip(";").split())

    def value(self, operand: str) -> str:
        """An operand as bits: of a register, a constant, a special register or a symbol."""
        if operand in self.registers:
            return operand.lstrip("%")
        if found := re.fullmatch(r"0[fF](\w{8})|0[dD](\w{16})", operand):
            return f"0x{found[1] or found[2]}ull"
        if re.fullmatch(r"-?(0x)?[0-9A-Fa-f]+", operand):
            return f"0x{int(operand, 0) & (1 << 64) - 1:x}ull"
        if found := re.fullmatch(r"%(\w+)\.([xyz])", operand):
            return f"{SPECIAL[found[1]]}.{found[2]}"
        if operand in self.strings:
            return f"reinterpret_cast<uint64_t>({self.strings[operand]})"
        if operand in self.shared:
            return f"{self.shared[operand]}ull"
        if found := re.fullmatch(re.escape(self.name) + r"_param_(\d+)", operand):
            return f"reinterpret_cast<uint64_t>(parameters[{found[1]}])"
        raise UnknownPtx(f"operand {operand}")

    def address(self, operand: str) -> str:
        base, plus, offset = operand.strip("[]").partition("+")
        return f"{self.value(base)} + {self.value(offset)}" if plus else self.value(base)

    def set(self, register: str, value: str) -> str:
        if register == "_":
            return f"{value};"
        return f"{self.value(register)} = put<{self.registers[register]}>({value});"

    def get(self, kind: str, operand: str) -> str:
        return f"get<{kind}>({self.value(operand)})"

    def translate(self, statement: str) -> None:
        if statement.endswith(":"):
            self.lines.append(f"{statement.lstrip('$')};")
            return
        if statement.startswith(".reg"):
            _, kind, name = statement.split()
            base, _, count = name.strip(">").partition("<")
            for register in [f"{base}{i}" for i in range(int(count))] if count else [base]:
                self.registers[register] = "bool" if kind == ".pred" else REGISTER[kind.lstrip(".")]
            return
        if statement.startswith((".param", ".pragma")):
            return
        guard, instruction = re.fullmatch(r"(?:@(!?%p\d+) )?(.*)", statement).groups()
        opcode, _, operands = instruction.partition(" ")
        code = self.instruction(opcode.split("."), split_operands(operands), operands)
        self.lines.append(f"if ({guard.replace('%', '')}) {{ {code} }}" if guard else code)

    def instruction(self, parts: list[str], operands: list[str], text: str) -> str:
        base, kind = parts[0], CPP_TYPE.get(parts[-1])
        if base == "bra":
            return f"goto {text.lstrip('$')};"
        if base == "ret":
            return "return;"
        if base in ("ld", "st", "cp", "mapa"):
            return self.memory(parts, operands)
        if base == "call" and operands[0] == "__assertfail":
            return f"assertion_failed({self.call['param0']});"
        if base == "mov" and any(map(is_vector, operands)):
            return self.packed_move(operands)
        if base == "mma":
            accumulators, a, b, c = map(elements, operands)
            if c != accumulators:
                raise UnknownPtx("mma with another sum than its result")
            sums, a, b = (", ".join(map(self.value, registers)) for registers in (c, a, b))
            function = "_".join(p for p in parts if p != "aligned")
            return f"{function}({{&{sums.replace(' ', ' &')}}}, {{{a}}}, {{{b}}});"
        function = "_".join(p for p in parts if p not in CPP_TYPE)
        if base in ("bar", "barrier", "trap"):
            if operands not in ([], ["0"], ["-1"]):  # another barrier than the block's, or a part of a warp
                raise UnknownPtx(f"{base} {text}")
            return f"{function}_();"
        if base == "cvt":
            to, source = (CPP_TYPE[p] for p in parts if p in CPP_TYPE)
            return self.set(operands[0], f"{function}<{to}, {source}>({self.get(source, operands[1])})")
        if base == "cvta":
            return self.set(operands[0], self.value(operands[1]))
        if base == "shfl":  # its second result, whether such a lane exists, is unused
            result, *arguments = operands
            return self.set(result.split("|")[0], f"{function}({', '.join(map(self.value, arguments))})")
        later = LATER_TYPES.get(base, {})
        arguments = [self.get(later.get(i, kind), o) for i, o in enumerate(operands) if i > 0]
        return self.set(operands[0], f"{function}_({', '.join(arguments)})")

    def memory(self, parts: list[str], operands: list[str]) -> str:
        if parts[0] == "mapa":
            return self.set(operands[0], f"mapa({self.value(operands[1])}, {self.value(operands[2])})")
        if parts == ["cp", "async", "wait_all"]:
            return "cp_async_wait_all();"
        if parts[0] == "cp":
            if len(operands) != 3:
                raise UnknownPtx("cp.async that fills up with zeros")
            to, source = map(self.address, operands[:2])
            return f"cp_async(block, {to}, {source}, {operands[2]});"
        if parts[:2] == ["st", "param"]:
            self.call[operands[0].strip("[]").partition("+")[0]] = self.value(operands[1])
            return ";"
        storing, kind = parts[0] == "st", CPP_TYPE[parts[-1]]
        at, names = operands if storing else reversed(operands)
        place = next((PLACE[p] for p in parts if p in PLACE), None)
        if place is None or not {"relaxed", "volatile"}.isdisjoint(parts):
            raise UnknownPtx(".".join(parts))
        place = place.format(self.address(at))
        registers = elements(names)
        if "acquire" in parts:
            return self.set(names, f"load_acquire<{kind}>({place})")
        if storing:
            values = ", ".join(self.get(kind, r) for r in registers)
            return f"store<{kind}, {len(registers)}>({place}, {{{values}}});"
        sets = " ".join(self.set(r, f"loaded[{i}]") for i, r in enumerate(registers))
        return f"{{ const auto loaded = load<{kind}, {len(registers)}>({place}); {sets} }}"

    def packed_move(self, operands: list[str]) -> str:
        to, source = operands
        if is_vector(source):
            parts = [self.value(r) for r in elements(source)]
            return self.set(to, f"join({', '.join(parts)})")
        registers = elements(to)
        kind = self.registers[next(r for r in registers if r != "_")]
        value = self.value(source)
        return " ".join(
            self.set(r, f"part<{kind}>({value}, {i})") for i, r in enumerate(registers) if r != "_"
        )

    def function(self, name: str) -> str:
        kinds: dict[str, list[str]] = {}
        for register, kind in self.registers.items():
            kinds.setdefault(kind, []).append(register.lstrip("%"))
        lines = [f"{kind} {', '.join(registers)};" for kind, registers in kinds.items()] + self.lines
        code = "\n  ".join(["[[maybe_unused]] const SharedMemory block;", "begin();", *lines])
        return f"static void {name}(void** parameters) {{\n  {code}\n}}\n"


def kernels(ptx: str, choice: str) -> list[tuple[Kernel, int]]:
    """Each kernel of a file whose name matches `choice`, and the bytes of its static shared memory."""
    ptx = re.sub(r"//.*", "", ptx)
    strings = {
        name: '"' + "".join(f"\\{int(byte):03o}" for byte in data.split(",")) + '"'
        for name, data in re.findall(r"\.global \.align 1 \.b8 (\S+)\[\d+\] = \{([^}]*)\};", ptx)
    }
    dynamic = re.findall(r"\.extern \.shared \.align 16 \.b8 (\w+)\[\];", ptx)
    found = []
    for entry in re.split(r"^(?:\.visible )?\.entry ", ptx, flags=re.M)[1:]:
        name = entry[: entry.index("(")].strip()
        if not re.search(choice, name):
            continue
        body = entry[entry.index("{") + 1 : entry.rindex("\n}")]
        shared, size = {}, 0
        for alignment, symbol, count in re.findall(r"\.shared \.align (\d+) \.b8 (\w+)\[(\d+)\];", ptx):
            if re.search(rf"\b{symbol}\b", body):
                shared[symbol] = aligned(size, int(alignment))
                size = shared[symbol] + int(count)
        size = aligned(size, 16)
        shared |= dict.fromkeys(dynamic, size)
        body = re.sub(r"\.shared \.align [^;]*;", "", body)
        found.append((Kernel(name, body, strings, shared), size))
    return found


def aligned(size: int, to: int) -> int:
    return -(-size // to) * to


def main(source: str, out: str, parts: int, choice: str = "") -> None:
    found = kernels(Path(source).read_text(), choice)
    for part in range(parts):
        text = '#include "ptx_on_cpu.h"\n#include "ptx_kernels.h"\n\nnamespace ulmfit_fast::ptx {\n'
        for i, (kernel, shared) in list(enumerate(found))[part::parts]:
            text += "\n" + kernel.function(f"kernel_{i}")
            text += f'static const Registered registered_{i}("{kernel.name}", kernel_{i}, {shared});\n'
        Path(f"{out}.{part}.cpp").write_text(text + "\n}  // namespace ulmfit_fast::ptx\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
