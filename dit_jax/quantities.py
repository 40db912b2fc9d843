"""Numbers as they are read: sizes in the unit that suits them, and things counted."""


def format_bytes(number: float) -> str:
    """A size of memory or disk: '2.00 GiB', '31.5 MiB', '1000 bytes'."""
    for unit, name, digits in ((1 << 30, "GiB", 2), (1 << 20, "MiB", 1), (1 << 10, "KiB", 1)):
        if abs(number) >= unit:
            return f"{number / unit:.{digits}f} {name}"
    return f"{number:.0f} bytes"


def counted(number: int, noun: str) -> str:
    """'1 image', '2 images'."""
    return f"{number} {noun}" + ("" if number == 1 else "s")
