"""Records: what is computed once and read many times, as latents, a teacher's samples, embeddings.

A set of records is a folder:

    header.json                the fields of a record, where they are from, and the list of shards
    shard-00000.<field>.npy    one array a field, the records of the shard along its leading axis
    shard-00001.<field>.npy    ...
    null.<field>.npy           what stands for "no condition", for fields that need to be told

A field is an array that every record has: its shape, its numbers on disk, and how they are read
(`Field`). Fields that tell a network what a record shows are its conditions, under their own names.
An axis may have another length in each shard: images of several sizes, texts of several lengths.
Plain .npy files are memory-mapped, so that a record read at random costs a page fault and no
parsing.

header.json is written last: until then unfinished.json stands in its place, and whoever writes goes
on from there (`RecordWriter`).
"""

from dit_jax.data.records.header import Field, Header, Null, Shard, StoredFile
from dit_jax.data.records.reader import Records, open_records, unfinished_nulls
from dit_jax.data.records.writer import RecordWriter, check_destination

__all__ = [
    "Field",
    "Header",
    "Null",
    "RecordWriter",
    "Records",
    "Shard",
    "StoredFile",
    "check_destination",
    "open_records",
    "unfinished_nulls",
]
