"""Reads TensorBoard event files, without TensorBoard."""

import struct

from tensorboardX.proto.event_pb2 import Event


def events(workdir):
    """Returns all events of a run. Format TFRecord: length, its checksum (4 bytes), the data, its checksum (4 bytes)."""
    found = []
    for file in sorted(workdir.glob("*events.out.tfevents*")):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            assert len(data) >= 16 + length
            data = data[16 + length :]
    return found


def scalars(found):
    """Returns (step, tag, value) of each scalar."""
    return [(event.step, v.tag, v.simple_value) for event in found for v in event.summary.value]
