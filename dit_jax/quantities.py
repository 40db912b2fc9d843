"""Numbers as they are read: sizes in the unit that suits them, things counted, tables."""

from collections.abc import Collection


def format_bytes(number: float) -> str:
    """A size of memory or disk: '2.00 GiB', '31.5 MiB', '1000 bytes'."""
    for unit, name, digits in ((1 << 30, "GiB", 2), (1 << 20, "MiB", 1), (1 << 10, "KiB", 1)):
        if abs(number) >= unit:
            return f"{number / unit:.{digits}f} {name}"
    return f"{number:.0f} bytes"


def counted(number: int, noun: str) -> str:
    """'1 image', '2 images'."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def spelled_numbers(numbers: Collection[int]) -> str:
    """Several in one name, ascending, as a shell expands them: '3', '{0..3}', '{0,2,5}'."""
    numbers = sorted(set(numbers))
    if len(numbers) == 1:
        return str(numbers[0])
    whole = numbers == list(range(numbers[0], numbers[-1] + 1))
    return "{" + (f"{numbers[0]}..{numbers[-1]}" if whole else ",".join(map(str, numbers))) + "}"


def table(rows: list[tuple[str, ...]]) -> str:
    """Aligned columns between rules, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = "-" * (sum(widths) + 3 * (len(widths) - 1))
    lines = [
        "   ".join(
            [name.ljust(widths[0]), *(v.rjust(w) for v, w in zip(row, widths[1:], strict=True))]
        )
        for name, *row in rows
    ]
    return "\n".join([rule, *lines, rule])
