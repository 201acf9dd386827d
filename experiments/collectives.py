"""What a compiled program sends between devices, read from its text.

for collective in collectives(jax.jit(f).lower(x).compile().as_text()):
    print(collective.kind, collective.dtypes, collective.sent_bytes)
"""

from __future__ import annotations

import dataclasses
import math
import re

KINDS = ("all-to-all", "all-gather", "all-reduce", "reduce-scatter", "collective-permute", "ragged-all-to-all")
_LINE = re.compile(
    rf"= (?P<type>.*?) (?P<kind>{'|'.join(sorted(KINDS, reverse=True))})(?P<start>-start)?\((?P<rest>.*)"
)
_ARRAY = re.compile(r"\b(pred|bf16|f8\w*|[fsuc]\d+)\[([\d,]*)\]")
# The three ways in which HLO writes who takes part: lists of devices, their shape, or axes of a mesh (from jax 0.11).
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\]|mesh\[(.*?)\][^{]*\{(.*?)\})")
_AXIS = re.compile(r"'([^']*)'=(\d+)")
_AXIS_NAME = re.compile(r"'([^']*)'")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program. An operation in a loop counts once.

    Attributes:
      kind: one of `KINDS`.
      dtypes: of its arrays, as in HLO: "f32", "bf16", "s32".
      result_bytes: size of its result on one device.
      devices: how many devices take part in one group of it.
    """

    kind: str
    dtypes: tuple[str, ...]
    result_bytes: int
    devices: int

    @property
    def sent_bytes(self) -> float:
        """Bytes that a device sends to others, by the usual algorithms (rings for all but all-to-all)."""
        share = (self.devices - 1) / self.devices
        match self.kind:
            case "all-reduce":
                return 2 * share * self.result_bytes
            case "reduce-scatter":
                return (self.devices - 1) * self.result_bytes
            case "collective-permute":
                return self.result_bytes
        return share * self.result_bytes


def collectives(text: str) -> list[Collective]:
    """The collectives of a compiled program.

    Args:
      text: HLO of one partition, from `compiled.as_text()`.
    """
    partitions = re.search(r"num_partitions=(\d+)", text)
    everyone = int(partitions.group(1)) if partitions else 1
    found = []
    for line in text.splitlines():
        if (match := _LINE.search(line)) is None:
            continue
        arrays = _ARRAY.findall(match["type"])
        if match["start"] and match["kind"] != "all-reduce":
            # Asynchronous: the operands are listed before the results.
            arrays = arrays[len(arrays) // 2 :]
        groups = _GROUPS.search(match["rest"])
        found.append(
            Collective(
                kind=match["kind"],
                dtypes=tuple(dtype for dtype, _ in arrays),
                result_bytes=sum(_bytes(dtype, shape) for dtype, shape in arrays),
                devices=_devices(groups) if groups else everyone,
            )
        )
    return found


def _devices(groups: re.Match[str]) -> int:
    devices, size, mesh, axes = groups.groups()
    if size is not None:
        return int(size)
    if mesh is None:
        return len(devices.split(","))
    sizes = dict(_AXIS.findall(mesh))
    return math.prod(int(sizes[name]) for name in _AXIS_NAME.findall(axes))


def _bytes(dtype: str, shape: str) -> int:
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
    return math.prod(int(n) for n in shape.split(",") if n) * bits // 8
