"""Numbers as QEMU's human monitor reads them: C-like expressions of signed 64-bit integers.

Registers (`$pc`) are for QEMU to tell: which there are depends on the target.

Source: QEMU monitor/hmp.c expr_unary(), expr_prod(), expr_logic(), expr_sum(), get_expr(). Its
precedence is kept: `* / %` binds tightest, then `& | ^`, then `+ -`. The messages are QEMU's.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable

from qemu_dump_ext.errors import RequestError
from qemu_dump_ext.structures.c_struct import U64_MAX
from qemu_dump_ext.untrusted import parse_unsigned

_NUMBER = re.compile(r"0[xX][0-9a-fA-F]+|[0-9]+")
_REGISTER = re.compile(r"\$[\w.]+", re.ASCII)
_REGISTER_VALUE = re.compile(r"(0x)?[0-9a-f]+")
_NESTING_MAX = 64
_OPERATORS: tuple[dict[str, Callable[[int, int], int]], ...] = (
    {"+": operator.add, "-": operator.sub},
    {"&": operator.and_, "|": operator.or_, "^": operator.xor},
    {"*": operator.mul},
)
_DIVISIONS = "/%"


def parse_expressions(text: str, command: str, most: int) -> list[int]:
    """Parse up to `most` expressions, one behind the other as on a line of the monitor.

    Args:
        text: The expressions; as in the monitor, `4 -1` is one of value 3.
        command: For the message about what is left over.
        most: How many there may be.

    Raises:
        RequestError: With what QEMU says.
    """
    parser = _Parser(text)
    values: list[int] = []
    while len(values) < most and not parser.at_end():
        values.append(parser.parse())
    if not parser.at_end():
        raise RequestError(f"{command}: extraneous characters at the end of line")
    return values


def registers_in(text: str) -> set[str]:
    """Return the registers that expressions name, each as `$name`."""
    return set(_REGISTER.findall(text))


def with_register(text: str, register: str, answer: str) -> str:
    """Return expressions with the value of a register instead of its name.

    Args:
        text: The expressions.
        register: One of `registers_in`.
        answer: What QEMU's monitor answers to `print REGISTER`.

    Raises:
        RequestError: With what QEMU says: it knows no such register.
    """
    value = answer.strip()
    if not _REGISTER_VALUE.fullmatch(value):
        raise RequestError(
            value.partition("\n")[0].strip() or "unknown register",
            hint="QEMU's monitor knows no such register of this target: give the number",
        )
    return re.sub(re.escape(register) + r"(?![\w.])", value, text)


def is_expression(text: str) -> bool:
    """Tell whether `text` is one expression and nothing else."""
    try:
        return len(parse_expressions(_REGISTER.sub("0", text), "", 1)) == 1
    except RequestError:
        return False


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._position = 0
        self._depth = 0
        self._skip_blanks()

    def at_end(self) -> bool:
        return self._position >= len(self._text)

    def parse(self) -> int:
        return self._binary(0)

    def _skip_blanks(self) -> None:
        while not self.at_end() and self._text[self._position].isspace():
            self._position += 1

    def _next(self) -> str:
        return "" if self.at_end() else self._text[self._position]

    def _step(self) -> None:
        self._position += 1
        self._skip_blanks()

    def _binary(self, level: int) -> int:
        tightest = level == len(_OPERATORS) - 1
        value = self._unary() if tightest else self._binary(level + 1)
        while (sign := self._next()) and (
            sign in _OPERATORS[level] or (tightest and sign in _DIVISIONS)
        ):
            self._step()
            other = self._unary() if tightest else self._binary(level + 1)
            if sign in _DIVISIONS:
                value = _divide(sign, value, other)
            else:
                value = _signed(_OPERATORS[level][sign](value, other))
        return value

    def _unary(self) -> int:
        self._depth += 1
        if self._depth > _NESTING_MAX:
            raise RequestError(f"expression nested deeper than {_NESTING_MAX}")
        value = self._operand()
        self._depth -= 1
        return value

    def _operand(self) -> int:
        sign = self._next()
        if sign and sign in "+-~":
            self._step()
            value = self._unary()
            return value if sign == "+" else _signed(-value if sign == "-" else ~value)
        if sign == "(":
            self._step()
            value = self._binary(0)
            if self._next() != ")":
                raise RequestError("')' expected")
            self._step()
            return value
        if sign == "'":
            return self._character()
        if sign == "$":
            raise RequestError("unknown register")
        return self._number()

    def _character(self) -> int:
        literal = self._text[self._position + 1 : self._position + 3]
        if not literal:
            raise RequestError("character constant expected")
        if literal[1:] != "'":
            raise RequestError("missing terminating ' character")
        self._position += 2
        self._step()
        # The monitor sees bytes, signed ones.
        # What was no UTF-8 came as an escape of its byte; other surrogates are no byte's.
        byte = literal[:1].encode("utf-8", "surrogateescape" if _is_byte(literal) else "replace")[0]
        return byte - 256 if byte > 127 else byte

    def _number(self) -> int:
        if self.at_end():
            raise RequestError("unexpected end of expression")
        match = _NUMBER.match(self._text, self._position)
        if match is None:
            raise RequestError(f"invalid char '{self._next()}' in expression")
        digits = match[0]
        if digits[:1] == "0" and digits[1:2] not in {"x", "X"}:
            digits = re.match("[0-7]*", digits)[0]  # type: ignore[index] # octal; matches always
            value = parse_unsigned(digits, 8)
        else:
            value = parse_unsigned(digits, 16 if digits[1:2] in {"x", "X"} else 10)
        if value is None:
            raise RequestError("number too large")
        self._position += len(digits)
        self._skip_blanks()
        return _signed(value)


def _is_byte(text: str) -> bool:
    return "\udc80" <= text[:1] <= "\udcff"


def _divide(sign: str, value: int, other: int) -> int:
    if not other:
        raise RequestError("division by zero")
    quotient = abs(value) // abs(other)  # as C: towards zero
    if (value < 0) != (other < 0):
        quotient = -quotient
    return _signed(quotient if sign == "/" else value - quotient * other)


def _signed(value: int) -> int:
    value &= U64_MAX
    return value - (1 << 64) if value >> 63 else value
