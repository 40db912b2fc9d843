"""Archives and pickles written by hand, to say what no writer would."""

import struct
import zlib

GIB = 2**30


def zeros(nbytes: int) -> bytes:
    """A deflate stream of so many zeros (a multiple of 16 MiB), a thousandth as long."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    piece = compressor.compress(bytes(2**24)) + compressor.flush(zlib.Z_FULL_FLUSH)
    return piece * (nbytes // 2**24) + zlib.compressobj(9, zlib.DEFLATED, -15).flush()


def entry(name, data=b"", *, size=None, compressed=None, offset=None):
    """A record of `write_zip`; the sizes may be lies."""
    is_deflated = compressed is not None
    return {
        "name": name.encode(),
        "data": compressed if is_deflated else data,
        "size": len(data) if size is None else size,
        "method": 8 if is_deflated else 0,
        "crc": 0 if is_deflated else zlib.crc32(data),
        "offset": offset,
    }


def write_zip(path, entries) -> None:
    """A zip archive of `entries`."""
    directory, position = [], 0
    with open(path, "wb") as file:
        for e in entries:
            stored = len(e["data"])
            large = e["size"] >= 2**32
            extra = struct.pack("<HHQ", 1, 8, e["size"]) if large else b""
            size = 2**32 - 1 if large else e["size"]
            common = (45, 0, e["method"], 0, 0, e["crc"], stored, size, len(e["name"]))
            start = position
            if e["offset"] is None:
                head = struct.pack("<4s5H3I2H", b"PK\3\4", *common, 0) + e["name"]
                file.write(head + e["data"])
                position += len(head) + stored
            else:
                start = e["offset"]
            fields = (45, *common, len(extra), 0, 0, 0, 0, start)
            directory.append(struct.pack("<4s6H3I5H2I", b"PK\1\2", *fields) + e["name"] + extra)
        body = b"".join(directory)
        count = min(len(entries), 65535)
        file.write(body)
        end = (0, 0, count, count, len(body), position, 0)
        file.write(struct.pack("<4s4H2IH", b"PK\5\6", *end))


def text(value: str) -> bytes:
    """The operation that puts a string on a pickle's stack."""
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def integer(value: int) -> bytes:
    """The operation that puts an integer on a pickle's stack."""
    encoded = value.to_bytes(16, "little", signed=True)
    return b"\x8a\x10" + encoded


def tensor(count: int, shape, strides) -> bytes:
    """Operations that make a float32 tensor of the record 0, of `count` elements."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu")
    storage += integer(count) + b"tQ"
    numbers = b"".join(b"(" + b"".join(map(integer, n)) + b"t" for n in (shape, strides))
    made = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + integer(0) + numbers
    return made + b"\x89ccollections\nOrderedDict\n)RtR"


def state_dict(*values: bytes) -> bytes:
    """A pickle of a dictionary {"w0": ..., "w1": ...} of what the operations make."""
    items = b"".join(text(f"w{i}") + value for i, value in enumerate(values))
    return b"\x80\x02}(" + items + b"u."


def call(module: str, name: str, *arguments: bytes) -> bytes:
    """Operations that call a function."""
    return f"c{module}\n{name}\n(".encode() + b"".join(arguments) + b"tR"


def write_pt(path, pickled: bytes, *others) -> None:
    """A file of torch.save with this pickle, and records besides."""
    write_zip(path, [entry("a/data.pkl", pickled), *others, entry("a/version", b"3\n")])
